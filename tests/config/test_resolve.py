import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.config.layout import Layout
from evomerge.config.params import Param
from evomerge.config.recipe import Recipe, Rule
from evomerge.config.resolve import curve_at, parameter_at, setting_at
from evomerge.errors import MergeError

OUTSIDE = (("embed", "model.embed_tokens.weight"), ("head", "lm_head.weight"))
LAYOUT = Layout(num_layers=5, outside=OUTSIDE)
WEIGHT = Param("weight", "a weight", default=None, per_model=True, low=-2.0, high=2.0)
LAM = Param("lambda", "a scale", default=1.0, per_model=False)
SWITCH = Param("normalize", "a switch", default=False, per_model=False, kind="bool")


def layer(number, part="mlp.up_proj"):
    return f"model.layers.{number}.{part}.weight"


def recipe(parameters=None, own=None):
    return Recipe.model_validate_json(
        Recipe(
            merge_method="m",
            models=({"model": {"path": "a"}, "parameters": own or {}},),
            parameters=parameters or {},
        ).model_dump_json()
    )


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9), st.integers(1, 12))
def test_curve_is_linear_between_points_that_lie_evenly_over_the_layers(curve, num_layers):
    layout = Layout(num_layers=num_layers, outside=OUTSIDE)
    for number in range(num_layers):
        depth = number / (num_layers - 1) if num_layers > 1 else 1.0
        expected = np.interp(depth * (len(curve) - 1), range(len(curve)), curve)
        assert curve_at(curve, number, layout) == pytest.approx(expected, abs=1e-12)
    assert curve_at(curve, None, layout) == curve[0]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40))
def test_one_value_for_each_layer_is_given_back_exactly(curve):
    layout = Layout(num_layers=len(curve), outside=OUTSIDE)
    assert [curve_at(curve, i, layout) for i in range(len(curve))] == curve


def test_tensors_outside_the_layers_take_the_first_value_the_head_too():
    for _, name in OUTSIDE:
        assert setting_at((0.25, 0.5, 1.0), name, LAYOUT) == 0.25
    assert setting_at((0.25, 0.5, 1.0), layer(4), LAYOUT) == 1.0


def test_the_first_rule_that_matches_wins_and_may_hold_a_curve():
    rules = (
        Rule(filter="mlp", value=(0.0, 1.0)),
        Rule(filter="layers.3.", value=7.0),
        Rule(filter="*", value=2.0),
        Rule(value=3.0),
    )
    assert setting_at(rules, layer(2), LAYOUT) == 0.5
    assert setting_at(rules, layer(3, "self_attn.q_proj"), LAYOUT) == 7.0
    assert setting_at(rules, "model.norm.weight", LAYOUT) == 2.0
    assert setting_at(rules[:2], "model.norm.weight", LAYOUT) is None


def test_a_filter_is_a_part_of_the_name_and_no_pattern():
    assert Rule(filter="q_proj.w", value=1.0).matches(layer(0, "self_attn.q_proj"))
    assert not Rule(filter="q.proj", value=1.0).matches(layer(0, "self_attn.q_proj"))


@pytest.mark.parametrize(
    ("own", "shared", "value"),
    [
        ({"weight": 0.5}, {"weight": 0.25}, 0.5),
        ({}, {"weight": 0.25}, 0.25),
        ({"weight": (Rule(filter="attn", value=0.5),)}, {"weight": 0.25}, 0.25),
        ({"weight": (Rule(filter="mlp", value=0.5),)}, {"weight": 0.25}, 0.5),
    ],
)
def test_a_models_own_value_comes_before_the_shared_one(own, shared, value):
    written = recipe(shared, own)
    assert parameter_at(WEIGHT, layer(0), LAYOUT, written, written.models[0]) == value


def test_shared_parameters_do_not_look_at_the_models():
    written = recipe({}, {"lambda": 3.0})
    assert parameter_at(LAM, layer(0), LAYOUT, written, None) == 1.0
    assert parameter_at(SWITCH, layer(0), LAYOUT, recipe({"normalize": True}), None) is True


def test_a_needed_value_that_nobody_gives_names_model_and_tensor():
    written = recipe({"weight": (Rule(filter="attn", value=0.5),)})
    with pytest.raises(
        MergeError, match=r"^model\.layers\.0\.mlp\.up_proj\.weight: m needs weight"
    ):
        parameter_at(WEIGHT, layer(0), LAYOUT, written, written.models[0])


@pytest.mark.parametrize("value", [2.5, -2.0000001])
def test_a_value_out_of_its_legal_range_is_refused(value):
    written = recipe({"weight": value})
    with pytest.raises(MergeError, match=r"weight is .*, allowed are values from -2 to 2"):
        parameter_at(WEIGHT, layer(0), LAYOUT, written, written.models[0])
    assert parameter_at(WEIGHT, layer(0), LAYOUT, recipe({"weight": 2.0}), written.models[0]) == 2.0
