"""Effects: equal ones are equal merges to the last bit, over all methods and between them."""

import math
import random
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import MergeError
from evomerge.methods import METHODS
from evomerge.methods.effect import Effect, Inputs
from evomerge.methods.effects import effect_of
from evomerge.methods.method import Values
from tests.contracts.merge_method import SEED, make_tensors, make_values, run

SHAPE = (9, 7)
NAMED = [METHODS[name] for name in METHODS]
SPECIAL = {
    "weight": [0.0, -0.0, 0.2, 0.3, 0.4, 0.6, 1.0, -0.3],
    "density": [0.0, 0.31, 0.310001, 0.32, 0.5, 1.0],
    "gamma": [0.0, 0.02, 0.020001, 0.1],
    "epsilon": [0.0, 0.1],
    "lambda": [0.0, 0.5, 1.0, -1.0],
    "lambda_mask": [0.4, 0.40000001, 0.6],
    "scale": [1.0, 0.5, 0.0],
    "t": [0.0, 0.3, 0.30000001, 1.0],
    "rank_share": [0.0, 0.5, 0.51, 1.0],
    "cutoff": [0.0, 0.3],
    "select_topk": [0.5, 1.0],
    "min_tasks": [1, 2],
    "max_iter": [1, 10],
    "tol": [1e-5, 1e-3],
    "eps": [1e-8, 1e-3],
    "r": [0.1, 0.3],
    "alpha": [0.2, 0.5],
}


def inputs_of(method, num_parents, threshold_ties="keep", **changes):
    base = "base" if method.has_deltas(True) else None
    parents = [f"parent-{i}" for i in range(num_parents)]
    names = tuple(changes.get("parents", parents))
    return Inputs(base, names, changes.get("shape", SHAPE), SEED, threshold_ties)


def values_of(method, num_parents, draw):
    """Values, each one drawn from a few that are special to some method or near each other."""
    own, shared = {}, {}
    for param in method.params:
        choices = [False, True] if param.kind == "bool" else SPECIAL[param.name]
        if param.per_model:
            own[param.name] = tuple(draw(choices) for _ in range(num_parents))
        else:
            shared[param.name] = draw(choices)
    return Values(own, shared)


def outcome(method, values, base, parents, ties):
    """The merge's bits, or why there is none: directions may add up to nothing."""
    try:
        return run(method, values, base, parents, threshold_ties=ties).numpy().tobytes()
    except MergeError:
        return "no merge"


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


@pytest.mark.parametrize("ties", ["keep", "index", "hash"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), num_parents=st.integers(1, 2), equal=st.booleans())
def test_equal_effects_are_equal_merges(ties, seed, num_parents, equal):
    """All methods at once, over two parents or one, the second of which may be the base."""
    draw = random.Random(seed).choice
    second_is_base = equal and num_parents == 2
    dtype = draw([torch.float32, torch.bfloat16])
    base, parents = make_tensors(num_parents, SHAPE, dtype)
    names = ["parent-0", "base" if second_is_base else "parent-1"][:num_parents]
    if second_is_base:
        parents[1] = base.clone()
    found = defaultdict(list)
    for method in NAMED:
        fits = method.min_parents <= num_parents <= (method.max_parents or num_parents)
        if not fits or (ties != "keep" and not method.has_threshold):
            continue
        for _ in range(6):
            values = values_of(method, num_parents, draw)
            whole = values.shared.get("trim_whole_model") and ties != "keep"
            if method.refuse(values) is None and not whole:
                effect = effect_of(method, values, inputs_of(method, 0, ties, parents=names))
                found[effect].append((method, values))
    for effect, alike in found.items():
        outcomes = {outcome(m, v, base, parents, ties) for m, v in alike}
        assert len(outcomes) == 1, (effect, [(m.name, v) for m, v in alike])


EQUAL = {
    "a mean's common factor": ("linear", 2, {"weight": (0.2, 0.4)}, {"weight": (0.3, 0.6)}),
    "one parent's mean": ("linear", 1, {"weight": (0.2,)}, {"weight": (0.7,)}),
    "negative zero": ("linear", 2, {"weight": (0.2, 0.0)}, {"weight": (0.2, -0.0)}),
    "int8_mask": ("ties", 2, {"int8_mask": False}, {"int8_mask": True}),
    "density of weight 0": (
        "ties",
        2,
        {"weight": (0.5, 0.0), "density": (0.5, 0.3)},
        {"weight": (0.5, 0.0), "density": (0.5, 0.9)},
    ),
    "weight of density 0": (
        "dare_ties",
        2,
        {"weight": (0.5, 0.1), "density": (0.5, 0.0)},
        {"weight": (0.5, 0.9), "density": (0.5, 0.0)},
    ),
    "gamma at density 1": (
        "breadcrumbs",
        2,
        {"density": (1.0, 0.5), "gamma": (0.0, 0.1)},
        {"density": (1.0, 0.5), "gamma": (0.2, 0.1)},
    ),
    "epsilon at density 1": (
        "della",
        2,
        {"density": (1.0, 0.5), "epsilon": (0.0, 0.1)},
        {"density": (1.0, 0.5), "epsilon": (0.2, 0.1)},
    ),
    "equally many": ("ties", 2, {"density": (0.5, 0.5)}, {"density": (0.5001, 0.5002)}),
    "rescaling nothing": (
        "breadcrumbs_ties",
        2,
        {"density": 1.0, "rescale": False},
        {"density": 1.0, "rescale": True},
    ),
    "lambda 0": ("ties", 2, {"lambda": 0.0}, {"lambda": 0.0, "weight": 0.9, "density": 0.2}),
    "rows of a flat one": (
        "nuslerp",
        2,
        {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        {"nuslerp_flatten": True, "nuslerp_row_wise": True},
    ),
    "scaled by 2 in float64": ("nuslerp", 2, {"weight": (0.2, 0.3)}, {"weight": (0.4, 0.6)}),
    "one parent on a sphere": ("multislerp", 1, {"weight": (0.2,)}, {"weight": (0.5,)}),
    "rank": ("tsv", 2, {"rank_share": 0.5}, {"rank_share": 0.51}),
    "products": ("consensus", 2, {"lambda": 0.5, "weight": 0.6}, {"lambda": 1.0, "weight": 0.3}),
}


@pytest.mark.parametrize("case", EQUAL)
def test_planted_equalities_are_found(case):
    name, num_parents, one, other = EQUAL[case]
    method, (base, parents) = METHODS[name], make_tensors(num_parents, SHAPE)
    both = [make_values(method, num_parents, **changes) for changes in (one, other)]
    inputs = inputs_of(method, num_parents)
    assert effect_of(method, both[0], inputs) == effect_of(method, both[1], inputs)
    first, second = (run(method, values, base, parents) for values in both)
    assert torch.equal(bits(first), bits(second))


ENDS = [
    ("task_arithmetic", {"weight": 0.0}, "base"),
    ("ties", {"density": 0.0}, "base"),
    ("ties", {"weight": 0.0}, "base"),
    ("fourier", {"weight": 0.0}, "base"),
    ("iso_c", {"lambda": 0.0}, "base"),
    ("consensus", {"lambda": 0.0}, "base"),
    ("pcb", {"weight": 0.0}, "base"),
    ("nearswap", {"t": 0.0}, "base"),
    ("slerp", {"t": 0.0}, "base"),
    ("slerp", {"t": 1.0}, "parent-0"),
    ("linear", {"weight": (0.7, 0.0)}, "parent-0"),
]


@pytest.mark.parametrize(("name", "changes", "model"), ENDS)
def test_a_merge_that_is_one_of_its_models_is_that_model(name, changes, model):
    method = METHODS[name]
    num_parents = min(2, method.max_parents or 2)
    base, parents = make_tensors(num_parents, SHAPE)
    values = make_values(method, num_parents, **changes)
    alone = METHODS["passthrough"]
    itself = effect_of(alone, make_values(alone, 1, scale=1.0), Inputs(None, (model,), SHAPE))
    assert effect_of(method, values, inputs_of(method, num_parents)) == itself
    tensor = base if model == "base" else parents[0]
    assert torch.equal(run(method, values, base, parents), tensor)


def test_nothing_dropped_and_nothing_elected_is_task_arithmetic():
    changes = {"density": 1.0, "weight": (0.4, 0.3), "lambda": 0.9}
    inputs = inputs_of(METHODS["ties"], 2)
    alike = [METHODS[name] for name in ("task_arithmetic", "dare_linear", "breadcrumbs")]
    alike.append(METHODS["della_linear"])
    effects = {effect_of(m, make_values(m, 2, **changes), inputs) for m in alike}
    assert len(effects) == 1
    base, parents = make_tensors(2, SHAPE)
    first, *others = [run(m, make_values(m, 2, **changes), base, parents) for m in alike]
    assert all(torch.equal(bits(first), bits(other)) for other in others)


def test_rounding_keeps_a_mean_by_election_apart():
    """In exact arithmetic TIES divides a common factor out; in float32 some elements differ."""
    method, inputs = METHODS["ties"], inputs_of(METHODS["ties"], 1)
    both = [make_values(method, 1, weight=(weight,), density=0.5) for weight in (0.3, 0.7)]
    base, parents = make_tensors(1, SHAPE)
    first, second = (run(method, values, base, parents) for values in both)
    assert not torch.equal(first, second)
    assert effect_of(method, both[0], inputs) != effect_of(method, both[1], inputs)
    ideal = [effect_of(method, values, inputs, ideal=True) for values in both]
    assert ideal[0] == ideal[1]


@pytest.mark.parametrize("method", NAMED, ids=lambda method: method.name)
def test_a_live_value_makes_another_effect(method):
    """Each parameter is moved alone; where the merge differs, so must the effect."""
    num_parents = max(method.min_parents, min(2, method.max_parents or 2))
    base, parents = make_tensors(num_parents, SHAPE)
    inputs = inputs_of(method, num_parents)
    start = make_values(method, num_parents)
    before, effect = run(method, start, base, parents), effect_of(method, start, inputs)
    for param in method.params:
        old = start.per_model.get(param.name, (start.shared.get(param.name),))[0]
        new = not old if param.kind == "bool" else next(c for c in SPECIAL[param.name] if c != old)
        value = (new, *start.per_model[param.name][1:]) if param.per_model else new
        changed = make_values(method, num_parents, **{param.name: value})
        if method.refuse(changed) is None:
            same = torch.equal(run(method, changed, base, parents), before)
            assert same or effect_of(method, changed, inputs) != effect, param.name


def test_what_random_numbers_hang_on_is_part_of_the_effect():
    method = METHODS["dare_linear"]
    values = make_values(method, 2)
    inputs = inputs_of(method, 2)
    assert effect_of(method, values, inputs) != effect_of(
        method, values, inputs._replace(mask_seed=SEED + 1)
    )
    full = make_values(method, 2, density=1.0)
    assert effect_of(method, full, inputs) == effect_of(
        method, full, inputs._replace(mask_seed=SEED + 1)
    )
    swapped = make_values(method, 2, weight=(0.0, 0.6), density=0.5)
    alone = make_values(method, 1, weight=(0.6,), density=0.5)
    # the same parent in another place has other random numbers
    later = effect_of(method, swapped, inputs)
    assert later != effect_of(method, alone, inputs._replace(parents=("parent-1",)))


def test_only_the_sign_of_a_zero_may_differ():
    """A model's negative zero takes the sign of what adds nothing to it."""
    method, inputs = METHODS["task_arithmetic"], inputs_of(METHODS["task_arithmetic"], 2)
    base, parents = torch.tensor([-0.0, 0.5]), [torch.tensor([-1.0, 1.0])] * 2
    both = [make_values(method, 2, weight=weight) for weight in (0.0, -0.0)]
    assert effect_of(method, both[0], inputs) == effect_of(method, both[1], inputs)
    merged = [run(method, values, base, parents) for values in both]
    assert torch.equal(*merged)
    signs = [math.copysign(1.0, tensor[0]) for tensor in merged]
    assert signs == [-1.0, 1.0]


def test_a_method_without_a_row_has_its_values_for_its_effect():
    method, inputs = METHODS["ram"], inputs_of(METHODS["ram"], 2)
    effect = effect_of(method, Values({}, {"epsilon": 1e-5}), inputs)
    assert effect == Effect(("ram", "base", inputs.parents, None, None), (1e-5,))
