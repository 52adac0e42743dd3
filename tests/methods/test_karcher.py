import math

import pytest
import torch

from evomerge.errors import MergeError
from evomerge.methods import METHODS
from tests.contracts.merge_method import NAME, make_tensors, make_values, run

KARCHER = METHODS["karcher"]


def mean(models, **changes):
    return run(KARCHER, make_values(KARCHER, len(models), **changes), None, models)


def test_of_two_models_it_is_the_middle_of_the_arc_at_their_mean_norm():
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    assert mean([x, y]).tolist() == pytest.approx([3.0 * math.sqrt(0.5)] * 2, rel=1e-6)
    _, (x, y) = make_tensors(2, 500, distance=0.2)
    middle = x / x.norm() + y / y.norm()
    assert torch.allclose(
        mean([x, y]), middle / middle.norm() * (x.norm() + y.norm()) / 2, rtol=1e-5, atol=1e-7
    )


def test_the_arcs_from_the_mean_to_the_models_cancel():
    """What makes it the mean; ten steps come close, and more come closer."""
    _, models = make_tensors(4, 500, distance=0.3)
    units = [model.double() / model.double().norm() for model in models]
    left = []
    for max_iter in (1.0, 3.0, 10.0):
        point = mean(models, max_iter=max_iter, tol=1e-9).double()
        point /= point.norm()
        angles = [torch.acos(unit @ point) for unit in units]
        arcs = [
            angle / torch.sin(angle) * (unit - unit @ point * point)
            for unit, angle in zip(units, angles, strict=True)
        ]
        left.append((sum(arcs) / 4).norm().item())
    assert left[0] > left[1]
    assert left[2] < 1e-6  # what float32 leaves of a point


def test_one_model_and_equal_models_come_back():
    _, (model,) = make_tensors(1, 500)
    assert torch.equal(mean([model]), model)
    assert torch.allclose(mean([model] * 3), model, rtol=3e-7, atol=0)


def test_a_zero_tensor_has_no_direction_but_counts_in_the_norm():
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    assert mean([x, y, torch.zeros(2)]).tolist() == pytest.approx([2 * 0.5**0.5] * 2, rel=1e-6)
    assert mean([torch.zeros(2)] * 2).tolist() == [0.0, 0.0]


def test_opposite_models_are_refused_with_tensor_models_and_cosine():
    _, (x, y) = make_tensors(2, 500)
    with pytest.raises(MergeError, match=rf"^{NAME}: parent-1 points opposite .*-1\.000000"):
        mean([x, x * -1.3])
    assert mean([x, x * -1.3, y]).isfinite().all()


def test_single_numbers_are_averaged():
    assert mean([torch.tensor([3.0]), torch.tensor([-1.0])]).tolist() == [1.0]


def test_a_rotation_of_the_models_rotates_the_mean():
    _, models = make_tensors(3, 64, distance=0.1)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
    turned = mean([turn @ model for model in models])
    assert torch.allclose(turned, turn @ mean(models), atol=1e-6)
