import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.config.params import Param
from evomerge.config.recipe import Rule
from evomerge.config.resolve import Position, choose, chosen, curve_at, parameter_at
from evomerge.errors import MergeError

WEIGHT = Param("weight", "a weight", default=None, per_model=True, low=-2.0, high=2.0)
LAM = Param("lambda", "a scale", default=1.0, per_model=False)
SWITCH = Param("normalize", "a switch", default=False, per_model=False, kind="bool")
COUNT = Param("max_iter", "a count", default=10, per_model=False, kind="int", low=1)


def layer(number, part="mlp.up_proj"):
    return f"model.layers.{number}.{part}.weight"


def at(name, num_layers=5):
    """Where a tensor stands in a model of five layers."""
    return Position(int(name.split(".")[2]) if "layers" in name else None, num_layers)


def setting_at(setting, tensor, position):
    """What a setting says about one tensor; None when none of its rules matches."""
    levels = ({"any": setting},)
    choice = choose("any", tensor, levels)
    said = None if choice is None else chosen("any", choice, levels)
    return curve_at(said, *position) if isinstance(said, tuple) else said


def value(param, name, *levels, model=None):
    return parameter_at(param, name, at(name), levels, "m", model)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9), st.integers(1, 12))
def test_curve_is_linear_between_points_that_lie_evenly_over_the_layers(curve, num_layers):
    for number in range(num_layers):
        depth = number / (num_layers - 1) if num_layers > 1 else 1.0
        expected = np.interp(depth * (len(curve) - 1), range(len(curve)), curve)
        assert curve_at(curve, number, num_layers) == pytest.approx(expected, abs=1e-12)
    assert curve_at(curve, None, num_layers) == curve[0]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40))
def test_one_value_for_each_layer_is_given_back_exactly(curve):
    assert [curve_at(curve, i, len(curve)) for i in range(len(curve))] == curve


def test_tensors_outside_the_layers_take_the_first_value_the_head_too():
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert setting_at((0.25, 0.5, 1.0), name, at(name)) == 0.25
    assert setting_at((0.25, 0.5, 1.0), layer(4), at(layer(4))) == 1.0


def test_the_first_rule_that_matches_wins_and_may_hold_a_curve():
    rules = (
        Rule(filter="mlp", value=(0.0, 1.0)),
        Rule(filter="layers.3.", value=7.0),
        Rule(filter="*", value=2.0),
        Rule(value=3.0),
    )
    attention = layer(3, "self_attn.q_proj")
    assert setting_at(rules, layer(2), at(layer(2))) == 0.5
    assert setting_at(rules, attention, at(attention)) == 7.0
    assert setting_at(rules, "model.norm.weight", at("model.norm.weight")) == 2.0
    assert setting_at(rules[:2], "model.norm.weight", at("model.norm.weight")) is None


def test_a_filter_is_a_part_of_the_name_and_no_pattern():
    assert Rule(filter="q_proj.w", value=1.0).matches(layer(0, "self_attn.q_proj"))
    assert not Rule(filter="q.proj", value=1.0).matches(layer(0, "self_attn.q_proj"))


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (({"weight": 0.5}, {"weight": 0.25}, {"weight": 0.125}), 0.5),
        (({}, {"weight": 0.25}, {"weight": 0.125}), 0.25),
        (({}, {}, {"weight": 0.125}), 0.125),
        (({"weight": (Rule(filter="attn", value=0.5),)}, {}, {"weight": 0.125}), 0.125),
        (({"weight": (Rule(filter="mlp", value=0.5),)}, {"weight": 0.25}), 0.5),
    ],
)
def test_the_nearest_level_that_says_something_counts(levels, expected):
    assert value(WEIGHT, layer(0), *levels) == expected


def test_where_nobody_says_anything_the_default_holds():
    assert value(LAM, layer(0), {"weight": 3.0}) == 1.0
    assert value(SWITCH, layer(0), {"normalize": True}) is True


def test_a_needed_value_that_nobody_gives_names_model_and_tensor():
    with pytest.raises(MergeError) as caught:
        value(WEIGHT, layer(0), {"weight": (Rule(filter="attn", value=0.5),)}, model="org/a")
    assert str(caught.value) == (
        "model.layers.0.mlp.up_proj.weight: m needs weight for org/a, and the recipe gives none. "
        "Add it to parameters."
    )


@pytest.mark.parametrize("came", [2.5, -2.0000001])
def test_a_value_out_of_its_legal_range_is_refused(came):
    with pytest.raises(MergeError) as caught:
        value(WEIGHT, layer(0), {"weight": came}, model="org/a")
    assert str(caught.value) == (
        f"{layer(0)}: weight is {came!r} for org/a, allowed are values from -2 to 2. "
        "Change the recipe."
    )
    assert value(WEIGHT, layer(0), {"weight": 2.0}) == 2.0


@pytest.mark.parametrize(
    ("param", "came", "made"),
    [(SWITCH, 1.0, True), (SWITCH, 0.0, False), (LAM, True, 1.0), (COUNT, 7.0, 7)],
)
def test_a_value_is_made_one_of_its_parameters_kind(param, came, made):
    got = value(param, layer(0), {param.name: came})
    assert (got, type(got)) == (made, type(made))


@pytest.mark.parametrize(
    ("param", "came", "wanted"),
    [(SWITCH, 0.5, "true or false is needed"), (COUNT, (1.0, 2.0), "a whole number is needed")],
)
def test_a_value_of_another_kind_is_refused(param, came, wanted):
    with pytest.raises(MergeError, match=wanted):
        value(param, layer(1), {param.name: came})
