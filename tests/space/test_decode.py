"""Decoding: every tensor gets the value of the knob that should govern it, rounded once."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.config.models import ModelRef
from evomerge.config.recipe import Recipe
from evomerge.config.resolve import Position, choose, chosen, curve_at, parameter_at
from evomerge.config.space import LayerScope, entries_of
from evomerge.space.decode import RecipeTemplate, decode, values_of
from evomerge.space.genome import Genome
from tests.space.models import (
    LAYOUT,
    OUTSIDE,
    PARAMS,
    PARENTS,
    PROPERTY,
    TENSORS,
    make_space,
    read,
    template,
)

SECTIONS = [
    "  weight: {search: [-0.5, 1.2]}\n  lambda: {search: [0.01, 2.0], scale: log}",
    "  weight: {scope: per_layer, outside: own}",
    "  weight: {scope: {every: 4}, outside: tied}\n  max_iter: {scope: {every: 2}, outside: own}",
    "  density: {scope: {curve: 4}, outside: tied}\n  normalize: {}",
    "  t: {search: [0.001, 1.0], scale: log, scope: {curve: 3}, outside: own}",
    """
  density:
    - {filter: self_attn, search: [0.2, 1.0], scope: {curve: 2}}
    - {filter: lm_head, choices: [0.25, 0.5, 0.75]}
    - {search: [0.2, 1.0], scope: {groups: [[0, 0], [1, 3], [4, 5]]}, outside: tied}
  weight: {}
""",
    """
  weight:
    - {filter: norm, models: [code]}
    - {filter: q_proj, scope: {every: 5}, models: [math]}
    - {scope: {curve: 6}, outside: own}
  normalize: [{filter: mlp}, {filter: layers}]
""",
]
"""Every scope, with and without filters, parents, and tensors outside the layers."""


def expected(space, section, genome, name, parent, tensor):
    """What the section says about one tensor, read off the knobs' names; None for no entry."""
    values = space.values(genome)
    for entry in entries_of(section[name]):
        if entry.models is not None and parent not in entry.models:
            continue
        if entry.filter is None or entry.filter in tensor:
            stem = ".".join(part for part in (name, parent, entry.filter) if part)
            return governed(values, stem, entry, tensor)
    return None


def governed(values, stem, entry, tensor):
    if entry.scope == "global":
        return values[stem]
    # only this entry's knobs: the next part of the name is a layer, a knot or a role
    own = {
        name.removeprefix(f"{stem}."): value
        for name, value in values.items()
        if name.startswith(f"{stem}.layer") or name.startswith(f"{stem}.knot")
    }
    role = OUTSIDE.get(tensor)
    if role is not None:
        tied = list(own.values())[0 if role == "embed" else -1]
        return values[f"{stem}.{role}"] if entry.outside == "own" else tied
    layer = int(tensor.split(".")[2])
    if isinstance(entry.scope, LayerScope) and entry.scope.curve is not None:
        knots = np.linspace(0, 5, len(own))
        return np.interp(layer, knots, list(own.values()))
    ends = {name: [int(n) for n in name.split("_")[1:]] for name in own}
    return next(own[name] for name, at in ends.items() if at[0] <= layer <= at[-1])


def value_at(recipe, name, parent, tensor):
    """What the recipe's own level says: a parent's parameters, or the shared ones."""
    position = PARENTS.index(parent) if parent else None
    level = recipe.parameters if parent is None else recipe.models[position].parameters
    return setting_at(level[name], tensor, place_of(tensor)) if name in level else None


def setting_at(setting, tensor, position):
    """What a setting says about one tensor; None when none of its rules matches."""
    levels = ({"any": setting},)
    choice = choose("any", tensor, levels)
    said = None if choice is None else chosen("any", choice, levels)
    return curve_at(said, *position) if isinstance(said, tuple) else said


def place_of(tensor):
    """Where a tensor stands."""
    return Position(LAYOUT.layer_of(tensor), LAYOUT.num_layers)


@pytest.mark.parametrize("text", SECTIONS)
@PROPERTY
@given(data=st.data())
def test_each_tensor_gets_the_knob_that_governs_it(text, data):
    space = make_space(text)
    units = st.lists(st.floats(0.0, 1.0), min_size=space.size, max_size=space.size)
    assert_governed(space, read(text), Genome(tuple(data.draw(units))))


@pytest.mark.parametrize("text", SECTIONS)
def test_no_knob_stands_in_for_another(text):
    space = make_space(text)
    ramp = Genome(tuple((i + 0.5) / space.size for i in range(space.size)))  # no two alike
    assert_governed(space, read(text), ramp)


def assert_governed(space, section, genome):
    recipe = decode(space, genome, template())
    for param in (param for param in PARAMS if param.name in section):
        for parent in PARENTS if param.per_model else (None,):
            for tensor in TENSORS:
                want = expected(space, section, genome, param.name, parent, tensor)
                came = value_at(recipe, param.name, parent, tensor)
                if want is None:
                    assert came is None
                else:
                    # between knots: half a step of the grid, coarser above 1 on a log scale
                    assert came == pytest.approx(want, rel=5e-6, abs=0.5e-6)


@pytest.mark.parametrize("text", SECTIONS)
@PROPERTY
@given(data=st.data())
def test_values_are_a_fixed_point_and_on_the_grid(text, data):
    space = make_space(text)
    units = st.lists(st.floats(0.0, 1.0), min_size=space.size, max_size=space.size)
    genome = Genome(tuple(data.draw(units)))
    values = values_of(space, genome)
    again = space.genome(values)
    assert values_of(space, again) == values
    assert space.genome(values_of(space, again)) == again
    recipe = decode(space, genome, template())
    assert decode(space, again, template()).hash == recipe.hash
    assert decode(space, genome, template()) == recipe
    for number in numbers_of(recipe):
        assert number == float(f"{number:.6g}") or number == round(number, 6)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def numbers_of(recipe):
    settings = [*recipe.parameters.values()]
    settings += [value for source in recipe.models for value in source.parameters.values()]
    while settings:
        setting = settings.pop()
        if isinstance(setting, tuple):
            settings += [getattr(part, "value", part) for part in setting]
        else:
            yield float(setting)


def test_global_knobs_are_plain_numbers():
    space = make_space("  weight: {search: [0.0, 1.0]}\n  normalize: {}\n  max_iter: {}")
    genome = space.genome(
        {"weight.math": 0.123456, "weight.code": 1.0, "normalize": False, "max_iter": 7}
    )
    recipe = decode(space, genome, template(shared={"lambda": 0.5}, mask_seed=9))
    assert recipe.models[0].parameters == {"weight": 0.123456}
    assert recipe.models[1].parameters == {"weight": 1.0}
    assert recipe.parameters == {"lambda": 0.5, "normalize": False, "max_iter": 7.0}
    assert recipe.parameters["normalize"] is False
    assert (recipe.merge_method, recipe.mask_seed, recipe.dtype) == ("ties", 9, "float32")
    assert [str(s.model) for s in recipe.models] == ["/m/math", "/m/code"]


def test_order_of_rules():
    space = make_space("""
  density:
    - {filter: mlp, search: [0.0, 1.0]}
    - {search: [0.0, 1.0], scope: {every: 3}, outside: tied, models: [math]}
""")
    values = dict(zip(space.names, (0.1, 0.2, 0.3, 0.4), strict=True))
    assert list(values) == [
        "density.math.mlp",
        "density.code.mlp",
        "density.math.layers_0_2",
        "density.math.layers_3_5",
    ]
    recipe = decode(space, space.genome(values), template(per_model={"density": {"code": 0.9}}))
    rules = [
        [(rule.filter, rule.value) for rule in source.parameters["density"]]
        for source in recipe.models
    ]
    assert rules[0] == [
        ("model.embed_tokens.weight", 0.3),
        ("model.norm.weight", 0.4),
        ("lm_head.weight", 0.4),
        ("mlp", 0.1),
        (None, (0.3, 0.3, 0.3, 0.4, 0.4, 0.4)),
    ]
    assert rules[1] == [("mlp", 0.2), (None, 0.9)]


def test_what_filters_miss_falls_to_the_shared_value_then_the_default():
    space = make_space("  density: {filter: mlp}\n  lambda: {filter: mlp}")
    recipe = decode(space, Genome(space.initial), template(shared={"density": 0.4}))
    density, lam = (next(p for p in PARAMS if p.name == name) for name in ("density", "lambda"))
    own, shared = recipe.models[0].parameters, recipe.parameters
    values = [
        parameter_at(density, name, place_of(name), (own, shared), "m", "a")
        for name in (TENSORS[0], "model.layers.1.mlp.w")
    ]
    assert values == [0.4, 0.55]
    assert parameter_at(lam, TENSORS[0], place_of(TENSORS[0]), (shared,), "m") == 1.0


def test_curves_are_rounded_layer_by_layer():
    space = make_space(
        "  t: {filter: layers, search: [0.0, 1.0], scope: {curve: 2}}", fixed={"t": 0.0}
    )
    genome = space.genome({"t.layers.knot_0": 0.0, "t.layers.knot_1": 1.0})
    recipe = decode(space, genome, template(shared={"t": 0.0}))
    curve = recipe.parameters["t"][0].value
    assert curve == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    third = decode(
        space, space.genome({"t.layers.knot_0": 0.0, "t.layers.knot_1": 0.333333}), template()
    )
    assert third.parameters["t"][0].value[1:4] == (0.066667, 0.133333, 0.2)


def test_slerp_whose_base_is_its_first_parent():
    first, second = ModelRef(path="/m/math"), ModelRef(path="/m/code")
    slerp = RecipeTemplate("slerp", first, (("math", first), ("code", second)))
    space = make_space("  t: {search: [0.0, 1.0]}")
    recipe = decode(space, space.genome({"t": 0.25}), slerp)
    assert recipe.base_model == first
    assert [source.model for source in recipe.models] == [first, second]
    assert recipe.references() == (first, second)
    assert recipe.parameters == {"t": 0.25}


def test_the_same_recipe_in_another_process():
    code = (
        "from tests.space.models import make_space, template\n"
        "from tests.space.test_decode import SECTIONS\n"
        "from evomerge.space.decode import decode\n"
        "from evomerge.space.genome import Genome\n"
        "spaces = [make_space(text) for text in SECTIONS]\n"
        "genomes = [Genome(tuple(i / s.size for i in range(s.size))) for s in spaces]\n"
        "print(*(s.digest + decode(s, g, template()).hash for s, g in zip(spaces, genomes)))\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) == len(SECTIONS)
