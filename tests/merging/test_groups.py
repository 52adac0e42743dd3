"""Plans of recipes that share an outline are what each recipe's own plan is."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.source import MemorySource
from evomerge.config.mergekit import parse_recipe
from evomerge.config.recipe import Recipe, Rule, SliceSource
from evomerge.config.resolve import Position, parameter_at
from evomerge.config.tokenizer import TokenizerConfig
from evomerge.errors import MergeError
from evomerge.kernels.statistics import StatisticsCache, TensorStatistics
from evomerge.merging.bind import MAX_FORMS, ModelSet
from evomerge.merging.plan import form_of, make_plan
from evomerge.methods import METHODS
from tests.merging.small import make_sources

SOURCES = make_sources(**{m: {"model.layers.0.count": torch.arange(3)} for m in ("base", "a", "b")})
LAYOUT = layout_of(SOURCES["base"].names())
FACTS = StatisticsCache()

WHOLE = """
merge_method: {method}
base_model: base
models: [{{model: a}}, {{model: b}}]
"""
STACK = """
merge_method: {method}
base_model: base
slices:
  - sources:
      - {{model: base, layer_range: [0, 2]}}
      - {{model: a, layer_range: [1, 3]}}
  - sources:
      - {{model: b, layer_range: [0, 1]}}
      - {{model: a, layer_range: [0, 1]}}
      - {{model: base, layer_range: [0, 1]}}
"""
FILTERS = ("mlp", "layers.1.", "norm", "lm_head", "nowhere", "*", None)

numbers = st.integers(0, 65).map(lambda number: number / 64)  # one in 66 is no density
curves = st.lists(numbers, min_size=1, max_size=4).map(tuple)
rules = st.builds(lambda f, v: Rule(filter=f, value=v), st.sampled_from(FILTERS), numbers | curves)
written = numbers | curves | st.lists(rules, min_size=1, max_size=3).map(tuple)


def levels(*names):
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, written))


@st.composite
def recipes(draw):
    """A recipe of TIES or DARE, over whole models or slices, with parameters at any level."""
    method = draw(st.sampled_from(["ties", "dare_linear"]))
    recipe = parse_recipe(draw(st.sampled_from([WHOLE, STACK])).format(method=method))
    own = levels("weight", "density")
    shared = draw(levels("weight", "density", "lambda"))
    fields = {"parameters": {"weight": draw(numbers), **shared}}
    if recipe.slices:
        fields["slices"] = [with_own(part, draw, own) for part in recipe.slices]
    else:
        fields["models"] = [{"model": s.model, "parameters": draw(own)} for s in recipe.models]
    return Recipe.model_validate({**as_fields(recipe), **fields}, strict=False)


def with_own(part, draw, own):
    sources = [
        {
            "model": s.model,
            "layer_range": s.layer_range,
            "parameters": {} if str(s.model) == "base" else draw(own),
        }
        for s in part.sources
    ]
    return {"sources": sources, "parameters": draw(own)}


def as_fields(recipe):
    return {name: getattr(recipe, name) for name in recipe.model_fields_set}


def renumbered(recipe, draw):
    """The recipe with other numbers in the same places."""

    def other(setting):
        if isinstance(setting, Rule):
            return Rule(filter=setting.filter, value=other(setting.value))
        return tuple(map(other, setting)) if isinstance(setting, tuple) else draw(numbers)

    def others(parameters):
        return {name: other(setting) for name, setting in parameters.items()}

    def listed(sources):
        return tuple(s.model_copy(update={"parameters": others(s.parameters)}) for s in sources)

    slices = tuple(
        part.model_copy(
            update={"sources": listed(part.sources), "parameters": others(part.parameters)}
        )
        for part in recipe.slices
    )
    changes = {"models": listed(recipe.models), "slices": slices}
    return recipe.model_copy(update={**changes, "parameters": others(recipe.parameters)})


class Opened(MemorySource):
    """A source as `open_model` gives it, in a folder without a tokenizer."""

    folder = Path(__file__).parent


def model_set():
    return ModelSet(
        {
            name: Opened({tensor: source.read(tensor) for tensor in source.names()}, name)
            for name, source in SOURCES.items()
        }
    )


def outcome(make, recipe):
    """The plan, or the whole text of what is wrong."""
    try:
        return make(recipe)
    except MergeError as error:
        return str(error)


def own_plan(recipe):
    return make_plan(recipe, SOURCES, LAYOUT)


@settings(max_examples=40)
@given(st.data())
def test_plans_and_messages_do_not_depend_on_what_was_planned_before(data):
    forms = data.draw(st.lists(recipes(), min_size=1, max_size=3))
    order = data.draw(st.lists(st.sampled_from(forms), min_size=2, max_size=8))
    models = model_set()
    for form in order:
        recipe = renumbered(form, data.draw)
        assert form_of(recipe) == form_of(form)
        known = outcome(lambda recipe: models.bind(recipe).plan, recipe)
        assert known == outcome(own_plan, recipe)
        if not isinstance(known, str):
            assert known.recipe is recipe
            assert tables(known) == tables(own_plan(recipe))


def tables(plan):
    """What a kernel is to do for each of the plan's tensors."""
    return [table(plan.method, job) for job in plan.jobs if job.values is not None]


def table(method, job):
    read = [SOURCES[source.model].read(source.name).reshape(-1) for source in job.inputs]
    models = tuple(map(str, job.parents))
    facts = TensorStatistics(job.spec.name, read[0], read[1:], "base", models, cache=FACTS)
    return method.table(job.values, facts)


@settings(max_examples=40)
@given(recipes())
def test_every_tensor_has_the_values_that_it_has_alone(recipe):
    plan = outcome(own_plan, recipe)
    if isinstance(plan, str):
        return
    for job in plan.jobs:
        if job.values is None:
            assert job.spec.name.endswith("count")
            continue
        sources, of_slice, position = place_of(recipe, job.spec.name)
        shared = [of_slice, recipe.parameters]
        for param in METHODS[recipe.merge_method].params:
            if param.per_model:
                parents = zip(job.parents, sources, strict=True)
                expected = tuple(
                    parameter_at(param, given.name, position, [own.parameters, *shared], "m")
                    for given, own in parents
                )
                assert job.values.per_model[param.name] == expected
            else:
                alone = parameter_at(param, job.spec.name, position, shared, "m")
                assert job.values.shared[param.name] == alone


def place_of(recipe, name):
    """A tensor's parents in the recipe, its slice's parameters, and its position there."""
    layer = LAYOUT.layer_of(name)
    if not recipe.slices:
        return recipe.models, {}, Position(layer, 3)
    last = layer == 2 if layer is not None else "embed" not in name
    part = recipe.slices[last]
    parents = [source for source in part.sources if str(source.model) != "base"]
    position = Position(None if layer is None else layer - 2 * last, part.num_layers)
    return parents, part.parameters, position


CURVED = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: [{filter: mlp, value: 0.5}, {value: [0.1, 0.2, 0.3]}]}}
  - {model: b, parameters: {weight: 0.5}}
"""


def test_values_are_made_once_for_all_tensors_that_share_them():
    plan = own_plan(parse_recipe(CURVED))
    groups = {}
    for job in plan.jobs:
        if job.values is not None:
            groups.setdefault(id(job.values), []).append(job.spec.name)
    assert sorted(groups.values()) == [
        ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"],
        ["model.layers.0.input_layernorm.weight"],
        [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)],
        ["model.layers.1.input_layernorm.weight"],
        ["model.layers.2.input_layernorm.weight"],
    ]


def test_what_is_made_of_values_is_made_once():
    values = own_plan(parse_recipe(CURVED)).jobs[0].values
    asked = []

    def total(values):
        asked.append(values)
        return sum(values.per_model["weight"])

    assert [values.once(total), values.once(total)] == [pytest.approx(0.6)] * 2
    assert asked == [values]


def test_models_are_looked_at_once_for_all_recipes_of_a_form():
    models = model_set()
    recipe = parse_recipe(CURVED)
    models.bind(recipe)
    for model in models.models.values():
        model.names = model.shape = model.dtype = None
    changed = parse_recipe(CURVED.replace("0.2", "0.25"))
    job = next(j for j in models.bind(changed).plan.jobs if "layers.1.input" in j.spec.name)
    assert job.values.per_model["weight"] == (0.25, 0.5)


def test_forms_are_forgotten_when_there_are_too_many():
    models = model_set()
    for number in range(MAX_FORMS + 1):
        recipe = parse_recipe(CURVED.replace("mlp", f"mlp{number}"))
        assert models.bind(recipe).plan == own_plan(recipe)
    assert len(models._prepared) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"merge_method": "breadcrumbs"},
        {"base_model": None},
        {"dtype": "bfloat16"},
        {"out_dtype": "bfloat16"},
        {"tokenizer": TokenizerConfig()},
        {"tokenizer_source": "base"},
        {"chat_template": "auto"},
        {"threshold_ties": "index"},
        {"rounding": "dither"},
        {"parameters": {"lambda": 1.0}},
        {"models": ()},
    ],
    ids=str,
)
def test_whatever_is_no_number_is_part_of_the_form(changes):
    recipe = parse_recipe(CURVED)
    assert form_of(recipe.model_copy(update=changes)) != form_of(recipe)


def test_every_field_of_a_recipe_is_part_of_the_form_or_a_number():
    covered = {
        "merge_method", "base_model", "dtype", "out_dtype", "tokenizer", "tokenizer_source",
        "chat_template", "threshold_ties", "rounding", "parameters", "models", "slices",
    }  # fmt: skip
    assert set(Recipe.model_fields) == covered | {"mask_seed"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("filter: mlp", "filter: norm"),
        ("value: 0.5", "value: [0.5, 0.5]"),
        ("[0.1, 0.2, 0.3]", "[0.1, 0.3]"),
        ("weight: 0.5", "weight: 0.5, density: 0.5"),
        ("model: b", "model: base"),
    ],
)
def test_curves_rules_and_models_are_part_of_the_form(old, new):
    assert form_of(parse_recipe(CURVED.replace(old, new))) != form_of(parse_recipe(CURVED))


def test_slices_are_part_of_the_form():
    recipe = parse_recipe(STACK.format(method="linear"))
    first, second = recipe.slices
    source = SliceSource(model=first.sources[0].model, layer_range=(1, 3))
    forms = {
        form_of(recipe.model_copy(update={"slices": slices}))
        for slices in (
            (first, second),
            (first,),
            (first.model_copy(update={"sources": (source, first.sources[1])}), second),
            (first.model_copy(update={"base_model": source.model}), second),
            (first.model_copy(update={"parameters": {"weight": 1.0}}), second),
        )
    }
    assert len(forms) == 5
