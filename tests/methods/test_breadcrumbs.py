import pytest
import torch

from evomerge.methods import METHODS
from tests.contracts.merge_method import make_tensors, make_values, run

BREADCRUMBS, BREADCRUMBS_TIES = METHODS["breadcrumbs"], METHODS["breadcrumbs_ties"]


def kept(delta, density, gamma, dtype=torch.float32):
    """What is left of one task vector, from a base of zeros."""
    settings = {"weight": (1.0,), "density": (density,), "gamma": (gamma,), "lambda": 1.0}
    parent = torch.tensor(delta, dtype=dtype)
    values = make_values(BREADCRUMBS, 1, **settings)
    return run(BREADCRUMBS, values, torch.zeros_like(parent), [parent], dtype).tolist()


@pytest.mark.parametrize(
    ("density", "gamma", "expected"),
    [
        (0.4, 0.2, [0, 0, 3, -4, 0]),  # the largest is dropped, of the rest two are kept
        (0.4, 0.0, [0, 0, 0, -4, 5]),
        (0.4, 0.19, [0, 0, 0, -4, 5]),  # less than one element
        (0.8, 0.9, [1, -2, 3, -4, 0]),  # density before gamma
        (0.19, 0.2, [0, 0, 0, 0, 0]),
        (0.0, 0.2, [0, 0, 0, 0, 0]),
        (1.0, 0.2, [1, -2, 3, -4, 5]),  # nothing is dropped, as in mergekit
    ],
)
def test_extremes_are_dropped(density, gamma, expected):
    assert kept([1.0, -2.0, 3.0, -4.0, 5.0], density, gamma) == expected


def test_what_equals_a_kept_element_is_kept():
    assert kept([3.0, -3.0, 3.0, 1.0], 0.25, 0.25) == [3, -3, 3, 0]
    assert kept([1.0, -1.0, 1.0, 3.0], 0.25, 0.25) == [1, -1, 1, 0]


def test_half_precision_magnitudes_are_compared_as_they_are_stored():
    one, next_one = 1.0, 1.0 + 2**-7
    assert kept([one, one, next_one, 2.0], 0.5, 0.25, torch.bfloat16) == [1, 1, next_one, 0]


@pytest.mark.parametrize(
    ("method", "plain"), [("breadcrumbs", "task_arithmetic"), ("breadcrumbs_ties", "ties")]
)
def test_density_one_is_the_plain_method_bit_for_bit(method, plain):
    base, parents = make_tensors(3, 5000)
    settings = {"density": (1.0,) * 3, "normalize": True}
    results = [
        run(METHODS[name], make_values(METHODS[name], 3, **settings), base, parents)
        for name in (method, plain)
    ]
    assert torch.equal(*results)


def test_without_gamma_it_trims_as_ties_does():
    base, parents = make_tensors(3, 5000)
    settings = {"gamma": (0.0,) * 3, "normalize": True}
    ours = run(BREADCRUMBS_TIES, make_values(BREADCRUMBS_TIES, 3, **settings), base, parents)
    ties = METHODS["ties"]
    assert torch.equal(ours, run(ties, make_values(ties, 3, **settings), base, parents))
