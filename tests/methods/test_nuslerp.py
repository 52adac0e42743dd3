import math

import pytest
import torch

from evomerge.errors import MergeError
from evomerge.methods import METHODS
from tests.contracts.merge_method import NAME, make_tensors, make_values, run, without_base

ON_DELTAS = METHODS["nuslerp"]
PLAIN = without_base(ON_DELTAS)
ROWS = {"nuslerp_flatten": False}
COLUMNS = {"nuslerp_flatten": False, "nuslerp_row_wise": True}


def between(x, y, weights, method=PLAIN, base=None, **changes):
    base = torch.zeros_like(x) if base is None else base
    return run(method, make_values(method, 2, weight=weights, **changes), base, [x, y])


@pytest.mark.parametrize("form", [{}, ROWS, COLUMNS], ids=["whole", "rows", "columns"])
@pytest.mark.parametrize("method", [PLAIN, ON_DELTAS], ids=["models", "deltas"])
def test_ends_are_the_models_themselves(method, form):
    base, (x, y) = make_tensors(2, (30, 20))
    for weights, end in (((2.0, 0.0), x), ((0.0, 0.3), y)):
        out = between(x, y, weights, method, base, **form)
        # a task vector is subtracted and added again
        assert torch.allclose(out, end, rtol=0, atol=0 if method is PLAIN else 1.5e-8)


def test_only_the_proportion_of_the_weights_counts():
    _, (x, y) = make_tensors(2, 100)
    assert torch.equal(between(x, y, (0.2, 0.6)), between(x, y, (1.0, 3.0)))


def test_weights_that_cancel_are_refused():
    refuse = METHODS["nuslerp"].refuse
    values = make_values(METHODS["nuslerp"], 2, weight=(0.5, -0.5))
    assert "add up to 0" in refuse(values)
    assert refuse(make_values(METHODS["nuslerp"], 2, weight=(0.5, 0.4))) is None


def test_each_row_turns_by_its_own_angle():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    y = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    half = math.sqrt(0.5)
    expected = torch.tensor([[half, half], [1.0, 0.0]])
    assert torch.allclose(between(x, y, (1.0, 1.0), **ROWS), expected)
    assert torch.allclose(between(x.T, y.T, (1.0, 1.0), **COLUMNS), expected.T)
    assert not torch.allclose(between(x, y, (1.0, 1.0)), expected)


def test_a_vector_is_one_row():
    _, (x, y) = make_tensors(2, 500)
    whole = between(x, y, (0.3, 0.5))
    for form in (ROWS, COLUMNS):
        assert torch.allclose(between(x, y, (0.3, 0.5), **form), whole, rtol=1e-6, atol=1e-9)


def test_opposite_models_are_refused_but_rows_take_the_straight_line():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(MergeError, match=rf"^{NAME}: parent-0 and parent-1 .*-1\.0"):
        between(x, -2.0 * x, (1.0, 1.0))
    assert torch.equal(between(x, -2.0 * x, (1.0, 0.0)), x)
    for form in (ROWS, COLUMNS):
        assert torch.allclose(between(x, -2.0 * x, (1.0, 1.0), **form), -0.5 * x)


def test_zero_vectors_do_no_harm():
    x, zero = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.zeros(2, 2)
    for form in ({}, ROWS, COLUMNS):
        assert between(x, zero, (1.0, 1.0), **form).isfinite().all()
        assert torch.equal(between(zero, zero, (1.0, 1.0), **form), zero)


@pytest.mark.parametrize("method", [PLAIN, ON_DELTAS], ids=["models", "deltas"])
def test_a_rotation_of_the_models_rotates_the_merge(method):
    base, (x, y) = make_tensors(2, 64)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
    merged = between(x, y, (0.3, 0.6), method, base)
    turned = between(turn @ x, turn @ y, (0.3, 0.6), method, turn @ base)
    assert torch.allclose(turned, turn @ merged, atol=1e-6)
