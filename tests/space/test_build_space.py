"""From the `space:` section to knobs: names, start values, and what is said when it is wrong."""

import pytest

from evomerge.config.layout import Layout
from evomerge.errors import ConfigError
from tests.space.models import EMBED, LAYOUT, TENSORS, make_space


def test_names_of_knobs_say_where_they_go():
    space = make_space("""
  weight: {search: [0.0, 1.2]}
  density:
    - {filter: self_attn, search: [0.2, 1.0], scope: {curve: 3}, models: [math]}
    - {search: [0.2, 1.0], scope: {every: 4}, outside: own, models: [code]}
  lambda: {}
  t:
    - {filter: mlp, search: [0.0, 1.0]}
    - {search: [0.0, 0.5], scope: {groups: [[0, 0], [1, 5]]}, outside: tied}
""")
    assert space.names == (
        "weight.math",
        "weight.code",
        "density.math.self_attn.knot_0",
        "density.math.self_attn.knot_1",
        "density.math.self_attn.knot_2",
        "density.code.layers_0_3",
        "density.code.layers_4_5",
        "density.code.embed",
        "density.code.norm",
        "density.code.head",
        "lambda",
        "t.mlp",
        "t.layer_0",
        "t.layers_1_5",
    )
    assert space.size == 14
    assert space.bounds[0] == (0.0, 1.2)
    assert space.bounds[10] == (0.5, 1.5)


def test_numbers_in_names_sort():
    deep = Layout(12, ())
    tensors = [f"model.layers.{i}.w" for i in range(12)]
    space = make_space("  lambda: {scope: per_layer}", layout=deep, tensors=tensors)
    assert space.names[5] == "lambda.layer_05"
    assert list(space.names) == sorted(space.names)


def test_start_values_and_steps():
    space = make_space("""
  weight: {search: [0.0, 1.2]}
  density: {search: [0.3, 0.9], initial: 0.4, sigma: 0.25}
  lambda: {search: [0.01, 1.0], scale: log}
  max_iter: {search: [3, 6]}
  normalize: {initial: false}
  t: {choices: [0.0, 0.1, 0.5]}
""")
    values = {knob.name: knob.initial for knob in space.knobs}
    assert values == {
        "weight.math": 0.5,  # 1 / number of parents
        "weight.code": 0.5,
        "density.math": 0.4,
        "density.code": 0.4,
        "lambda": 0.1,  # the middle of the logarithm
        "max_iter": 5,
        "normalize": False,
        "t": 0.1,
    }
    assert space.initial == pytest.approx((5 / 12, 5 / 12, 1 / 6, 1 / 6, 0.5, 0.625, 0.25, 0.5))
    # four whole numbers, two and three choices: at least half a share
    assert space.steps(0.1) == pytest.approx((0.1, 0.1, 0.25, 0.25, 0.1, 0.125, 0.25, 1 / 6))
    outside = make_space("  weight: {search: [0.6, 1.2]}")  # 1/2 lies below
    assert outside.knobs[0].initial == 0.9


def test_identity():
    text = "  density: {search: [0.2, 1.0], scope: {every: 2}, outside: own}"
    space = make_space(text)
    assert space == make_space(text)
    assert space.digest == make_space(text).digest
    for change in (("0.2", "0.3"), ("2}", "3}"), ("own", "tied"), ("}, o", "}, sigma: 0.3, o")):
        assert make_space(text.replace(*change)).digest != space.digest
    assert space.describe()[0] == {
        "name": "density.math.layers_0_1",
        "kind": "float",
        "scale": "linear",
        "low": 0.2,
        "high": 1.0,
        "choices": [],
        "initial": 0.6,
        "sigma": None,
    }


PROBLEMS = [
    ("  wieght: {}", "space.wieght: the method has no such parameter. Did you mean weight?"),
    (
        "  density: {search: [0.5, 1.5]}",
        "space.density.search: [0.5, 1.5] is not legal, density goes from 0 to 1. Narrow it.",
    ),
    (
        "  t: {}",
        "space.t.search: is missing, and t has no range of its own. Write search: [low, high].",
    ),
    (
        "  lambda: {search: [0.0, 1.0], scale: log}",
        "space.lambda.scale: log needs a lowest value above 0, search is [0.0, 1.0]. Write linear.",
    ),
    (
        "  lambda: {search: [0.1234567, 1.0]}",
        "space.lambda.search: came 0.1234567, recipes keep 6 decimals. Round it.",
    ),
    (
        "  lambda: {search: [0.01, 1.234567], scale: log}",
        "space.lambda.search: came 1.234567, recipes keep 6 significant digits. Round it.",
    ),
    ("  lambda: {initial: 3}", "space.lambda.initial: came 3, allowed is 0.5 to 1.5."),
    ("  lambda: {initial: true}", "space.lambda.initial: came True, a number is needed."),
    (
        "  density: {choices: [0.5, 2]}",
        "space.density.choices: 2 is not legal, density goes from 0 to 1. Remove it.",
    ),
    (
        "  density: {choices: [0.5, 1.0], initial: 0.7}",
        "space.density.initial: came 0.7, allowed is one of [0.5, 1.0].",
    ),
    (
        "  max_iter: {search: [1.5, 3]}",
        "space.max_iter.search: came 1.5, a whole number is needed.",
    ),
    (
        "  max_iter: {kind: float}",
        "space.max_iter.kind: came 'float', max_iter takes whole numbers. Remove kind.",
    ),
    (
        "  max_iter: {choices: [1, 2.5]}",
        "space.max_iter.choices: came 2.5, max_iter takes whole numbers.",
    ),
    (
        "  max_iter: {scope: {curve: 3}, outside: tied}",
        "space.max_iter.scope: a curve passes between its knots, which need kind float. "
        "Use groups.",
    ),
    (
        "  normalize: {search: [0, 1]}",
        "space.normalize.search: normalize is a switch, it has no range. Remove search.",
    ),
    (
        "  normalize: {choices: [0, 1]}",
        "space.normalize.choices: came 0, true or false is needed.\n"
        "space.normalize.choices: came 1, true or false is needed.",
    ),
    (
        "  normalize: {scope: per_layer, outside: own}",
        "space.normalize.scope: normalize is a switch, and layer curves hold numbers. Use filters.",
    ),
    (
        "  weight: {models: [mth]}",
        "space.weight.models: no parent is called 'mth'. Did you mean math?",
    ),
    (
        "  lambda: {models: [math]}",
        "space.lambda.models: lambda is shared by all parents. Remove models.",
    ),
    (
        "  weight: [{filter: attention}, {}]",
        "space.weight[0].filter: no tensor has 'attention' in its name. Take a part of a name.",
    ),
    (
        "  weight: [{}, {filter: mlp}]",
        "space.weight[1].filter: every tensor it matches is governed by an entry before it. "
        "Put it first.",
    ),
    (
        "  weight: {scope: {every: 2}}",
        f"space.weight.outside: is missing, and {EMBED}, model.norm.weight, lm_head.weight belong "
        "to no layer. Write own (a knob for each role) or tied (embeddings to the first layer, "
        "norm and head to the last).",
    ),
    (
        "  weight: {filter: self_attn, scope: {every: 2}, outside: own}",
        "space.weight.outside: governs no tensor outside the layers. Remove it.",
    ),
    (
        "  weight: {filter: lm_head, scope: per_layer, outside: own}",
        "space.weight.scope: every tensor it governs lies outside the layers. Write scope: global.",
    ),
    (
        "  weight: {filter: layers.2., scope: {every: 3}}",
        "space.weight.scope: no tensor it governs lies in layers 3 to 5, "
        "so that knob sets nothing.",
    ),
    (
        "  weight: {scope: {curve: 7}, outside: tied}",
        "space.weight.scope: a curve of 7 knots has more knobs than the models have layers (6). "
        "Write fewer.",
    ),
    (
        "  weight: {scope: {every: 6}, outside: tied}",
        "space.weight.scope: groups of 6 layers leave one group, the models have 6 layers. "
        "Write fewer, or scope: global.",
    ),
    (
        "  weight: {scope: {groups: [[0, 1], [3, 5]]}, outside: tied}",
        "space.weight.scope: [3, 5] came where a group that begins with layer 2 is needed. "
        "Cover the layers 0 to 5 once, in order.",
    ),
    (
        "  weight: {scope: {groups: [[0, 3], [3, 5]]}, outside: tied}",
        "space.weight.scope: [3, 5] came where a group that begins with layer 4 is needed. "
        "Cover the layers 0 to 5 once, in order.",
    ),
    (
        "  weight: {scope: {groups: [[0, 4]]}, outside: tied}",
        "space.weight.scope: the groups end with layer 4, the models with layer 5. "
        "Cover every layer once.",
    ),
    (
        "  weight: {scope: {groups: [[0, 6]]}, outside: tied}",
        "space.weight.scope: the groups end with layer 6, the models with layer 5. "
        "Cover every layer once.",
    ),
    (" {}", "space: is empty. Name at least one parameter of the merge method."),
]


@pytest.mark.parametrize(("text", "sentences"), PROBLEMS)
def test_says_what_is_wrong(text, sentences):
    with pytest.raises(ConfigError) as error:
        make_space(text)
    assert str(error.value) == sentences


def test_every_problem_at_once():
    with pytest.raises(ConfigError) as error:
        make_space("""
  wieght: {}
  density: [{search: [0.5, 1.5], filter: mpl}, {models: [cod]}]
  lambda: {initial: 9}
""")
    fields = [line.partition(": ")[0] for line in str(error.value).splitlines()]
    assert fields == [
        "space.wieght",
        "space.density[0].search",
        "space.density[1].models",
        "space.density[0].filter",
        "space.lambda.initial",
    ]


@pytest.mark.parametrize(
    ("text", "fixed", "clashes"),
    [
        ("  lambda: {}", {"lambda": 1.0}, True),
        ("  lambda: {filter: mlp}", {"lambda": 1.0}, False),
        ("  weight: {}", {"weight": 0.5}, True),
        ("  weight: {models: [math]}", {"weight": 0.5}, False),
        ("  weight: [{models: [math]}, {models: [code]}]", {"weight": 0.5}, True),
        ("  weight: {models: [math]}", {"weight": {"math": 0.5}}, True),
        ("  weight: {models: [math]}", {"weight": {"code": 0.5}}, False),
        ("  weight: {filter: mlp}", {"weight": {"math": 0.5}}, False),
        ("  weight: {}", {"lambda": 0.5}, False),
    ],
)
def test_fixed_or_searched(text, fixed, clashes):
    if not clashes:
        assert make_space(text, fixed).size >= 1
        return
    name = next(iter(fixed))
    with pytest.raises(ConfigError, match=rf"^space.{name}: is searched for every tensor, and fix"):
        make_space(text, fixed)


def test_knobs_without_effect_are_not_made():
    space = make_space("  weight: [{models: [math]}, {filter: mlp}]")
    assert space.names == ("weight.math", "weight.code.mlp")


def test_equal_names_are_refused():
    layout = Layout(6, (*LAYOUT.outside, ("embed", "model.wpe.weight")))
    entries = "[{filter: embed}, {scope: per_layer, outside: own}]"
    with pytest.raises(ConfigError, match=r"^space: two knobs are called lambda.embed. Change a f"):
        make_space(f"  lambda: {entries}", layout=layout, tensors=(*TENSORS, "model.wpe.weight"))


def test_a_tensor_outside_that_no_filter_can_name():
    tensors = (*TENSORS, "model.layers.0.lm_head.weight.scale")
    with pytest.raises(
        ConfigError, match=r"space.weight.outside: lm_head.weight is part of the na"
    ):
        make_space("  weight: {scope: per_layer, outside: own}", tensors=tensors)


def test_models_without_tensors_outside():
    tensors = [name for name in TENSORS if "layers" in name]
    layout = Layout(LAYOUT.num_layers, ())
    space = make_space("  lambda: {scope: {every: 3}}", layout=layout, tensors=tensors)
    assert space.names == ("lambda.layers_0_2", "lambda.layers_3_5")
