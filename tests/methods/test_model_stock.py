import pytest
import torch

from evomerge.methods import METHODS
from tests.contracts.merge_method import make_tensors, make_values, run

MODEL_STOCK = METHODS["model_stock"]


def stock(base, parents, **changes):
    return run(MODEL_STOCK, make_values(MODEL_STOCK, len(parents), **changes), base, parents)


def test_equal_task_vectors_give_the_mean():
    base, (model,) = make_tensors(1, (20, 30))
    for filter_wise in (False, True):
        out = stock(base, [model] * 3, filter_wise=filter_wise)
        assert torch.allclose(out, model, rtol=1e-6, atol=1e-8)


def test_task_vectors_at_right_angles_leave_the_base():
    base = torch.tensor([5.0, 6.0, 7.0])
    parents = [base + row for row in torch.eye(3)]
    assert torch.equal(stock(base, parents), base)


@pytest.mark.parametrize("num_models", [2, 3, 5])
def test_the_position_follows_the_angle(num_models):
    """Task vectors with one cosine between any two: a shared part and parts of their own."""
    own = torch.eye(num_models)
    for shared in (0.5, 1.0, 2.0):
        deltas = torch.cat([own, torch.full((num_models, 1), shared)], dim=1)
        cosine = shared**2 / (1 + shared**2)
        t = num_models * cosine / (1 + (num_models - 1) * cosine)
        out = stock(torch.zeros(num_models + 1), list(deltas))
        assert torch.allclose(out, t * deltas.mean(0), rtol=1e-6)


def test_each_row_has_a_position_of_its_own():
    base = torch.zeros(2, 2)
    x, y = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 2.0]])
    rows = stock(base, [x, y], filter_wise=True)
    assert torch.allclose(rows, torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    assert not torch.allclose(stock(base, [x, y]), rows)


def test_opposite_task_vectors_leave_the_base():
    base, (model,) = make_tensors(1, 50)
    for filter_wise in (False, True):
        # 1 + cos is 0 up to rounding: no position follows
        opposite = [base + (model - base), base - (model - base)]
        assert torch.allclose(stock(base, opposite, filter_wise=filter_wise), base, atol=1e-6)


def test_a_rotation_of_the_models_rotates_the_merge():
    base, models = make_tensors(3, 64, distance=0.1)
    models = [model + 0.1 for model in models]
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
    turned = stock(turn @ base, [turn @ model for model in models])
    assert torch.allclose(turned, turn @ stock(base, models), atol=1e-6)
