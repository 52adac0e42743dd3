"""Liveness: knobs without effect and knobs that do the same are found, with the reason."""

import shutil

import pytest

from evomerge.adapters.open import fingerprint_of, open_model
from evomerge.checkpoints.architecture import layout_of
from evomerge.config.search import make_search
from evomerge.merging.bind import ModelSet
from evomerge.merging.canonical import CanonicalForms
from evomerge.methods import METHODS
from evomerge.space.space import build_space
from evomerge.study.liveness import find_dead_knobs
from evomerge.study.setup import make_template
from tests.adapters.small import layer, make_adapter
from tests.world import make_world, settings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    shutil.copytree(folder / "a", folder / "copy")
    return folder


def findings(world, method, space, parents="ab", **parameters):
    """The sentences on a search, without its tasks."""
    if not isinstance(parents, dict):
        parents = {name: str(world / name) for name in parents}
    config = make_search(
        settings(
            world,
            merge={"method": method, "parameters": parameters},
            space=space,
            models={"base": str(world / "base"), "parents": parents},
        )
    )
    row, refs = METHODS[method], [config.models.base, *config.models.parents.values()]
    models = {str(ref): open_model(ref) for ref in refs}
    names = models[str(refs[0])].names()
    fixed = config.merge.parameters
    built = build_space(config.space, fixed, row.params, list(parents), layout_of(names), names)
    fingerprints = {name: fingerprint_of(model) for name, model in models.items()}
    forms = CanonicalForms(ModelSet(models), fingerprints)
    found = find_dead_knobs(built, make_template(config, row, "float32"), forms)
    return [finding.sentence for finding in found]


RANGE = {"search": [0.2, 1.0]}
ROWS = {"choices": [False, True]}
CASES = {
    "one parent": (
        ("ties", {"weight": RANGE, "density": RANGE}, "a"),
        ["weight.a has no effect: ties with one parent normalises it away. Remove it from space."],
    ),
    "one parent's mean": (
        ("linear", {"weight": RANGE}, "a"),
        ["weight.a has no effect: linear with one parent normalises it away."],
    ),
    "weight 0": (
        ("ties", {"density": RANGE}, "ab", {"weight": {"a": 0.5, "b": 0.0}}),
        ["density.b has no effect: the weight of b is 0. Remove it from space."],
    ),
    "density 1": (
        ("breadcrumbs", {"weight": RANGE, "gamma": {"search": [0.0, 0.05]}}),
        ["gamma.a has no effect: nothing is dropped where the density of a is 1.", "gamma.b has"],
    ),
    "rescale": (
        ("ties", {"weight": RANGE, "rescale": {}}, "ab", {"normalize": False}),
        ["rescale has no effect: at density 1 nothing is dropped. Remove it from space."],
    ),
    "int8_mask": (
        ("task_arithmetic", {"weight": RANGE, "int8_mask": {}}),
        ["int8_mask has no effect: accepted because mergekit files often set it"],
    ),
    "rows": (
        ("nuslerp", {"nuslerp_row_wise": ROWS}, "ab", {"weight": 0.5}),
        ["nuslerp_row_wise has no effect: nuslerp_flatten leaves no rows. Remove it from space."],
    ),
    "all weights 0": (
        ("task_arithmetic", {"lambda": {}}, "ab", {"weight": 0.0}),
        ["lambda has no effect: all weights are 0. Remove it from space."],
    ),
    "no reason known": (
        ("ties", {"normalize": {}, "density": RANGE}, "a", {"weight": 1.0, "lambda": 0.0}),
        ["normalize and density.a have no effect. Remove them from space."],
    ),
    "ratio": (
        ("linear", {"weight": RANGE}),
        [
            "weight.a and weight.b change the merge in one and the same way: only the ratio of the "
            "weights counts. Search one, and fix the others in merge.parameters."
        ],
    ),
    "ratio in each layer": (
        ("linear", {"weight": {**RANGE, "scope": "per_layer", "outside": "tied"}}),
        ["weight.a.layer_0 and weight.b.layer_0 change the merge in one and the same way: only "],
    ),
    "product": (
        ("task_arithmetic", {"weight": RANGE, "lambda": {}}, "a"),
        ["weight.a and lambda change the merge in one and the same way: they are multiplied."],
    ),
}
FINE = {
    "task_arithmetic": {"weight": {"search": [0.0, 1.0]}},
    "ties": {"weight": RANGE, "density": RANGE, "lambda": {}, "rescale": {}, "normalize": {}},
    "breadcrumbs": {"weight": RANGE, "density": RANGE, "gamma": {}},
    "dare_linear": {"weight": RANGE, "density": RANGE, "rescale": {}},
    "della": {"density": {}, "epsilon": {}, "lambda": {}, "weight": {}},
    "slerp": {"t": {"scope": {"curve": 2}, "outside": "own"}},
    "nuslerp": {"weight": [{"models": ["a"], **RANGE}], "nuslerp_flatten": {}},
    "consensus": {"weight": RANGE, "lambda_mask": {}, "min_tasks": {}},
    "ramplus_tl": {"epsilon": {}, "r": {}, "alpha": {}},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_and_why(case, world):
    (method, space, *rest), expected = CASES[case]
    parents, parameters = (*rest, *("ab", {})[len(rest) :])
    found = findings(world, method, space, parents, **parameters)
    assert len(found) == len(expected), found
    for sentence, begins in zip(found, expected, strict=True):
        assert sentence.startswith(begins), sentence


@pytest.mark.parametrize("method", FINE)
def test_nothing_is_said_of_live_knobs(method, world):
    given = {"nuslerp": {"weight": {"b": 0.4}}, "della": {"normalize": False}}.get(method, {})
    assert findings(world, method, FINE[method], **given) == []


def test_knobs_that_are_alike_in_many_places_are_one_line(world):
    layers = {"scope": "per_layer", "outside": "tied"}
    space = {"density": {**RANGE, **layers}, "weight": {**RANGE, **layers}}
    found = findings(world, "ties", space, "a")
    assert found == [
        "weight.a.layer_0 and weight.a.layer_1 have no effect: ties with one parent normalises it "
        "away. Remove them from space."
    ]
    (ratio,) = findings(world, "linear", {"weight": {**RANGE, **layers}})
    assert "(so do the like in 1 more places)" in ratio


def test_a_knob_that_only_counts_with_another_value_of_a_switch_is_live(world):
    space = {"nuslerp_row_wise": ROWS, "nuslerp_flatten": ROWS}
    assert findings(world, "nuslerp", space, weight=0.5) == []


def test_a_knob_that_begins_where_nothing_counts_is_live(world):
    weight = {"search": [0.0, 1.0], "initial": 0.0}
    space = {"weight": weight, "density": RANGE}
    assert findings(world, "ties", space, normalize=False) == []


def test_models_that_are_one(world):
    parents = {"a": str(world / "a"), "again": str(world / "copy")}
    found = findings(world, "task_arithmetic", {"weight": RANGE}, parents)
    assert found[0] == "again and a are one model, to the last bit. Remove one."


def test_an_adapter_has_nothing_to_say_elsewhere(world, tmp_path):
    make_adapter(tmp_path / "lora", world / "base", 1, {layer(0): 2}, r=2)
    parents = {"a": str(world / "a"), "lora": f"{world / 'base'}+{tmp_path / 'lora'}"}
    space = {"weight": [{"filter": "mlp", **RANGE}, RANGE]}
    (found,) = findings(world, "task_arithmetic", space, parents)
    assert found == (
        "weight.lora.mlp has no effect: lora has the same tensors as the base there. Remove it "
        "from space."
    )
