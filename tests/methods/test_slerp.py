import math

import pytest
import torch

from evomerge.errors import MergeError
from evomerge.methods import METHODS
from tests.contracts.merge_method import NAME, make_tensors, make_values, run

SLERP = METHODS["slerp"]


def between(base, model, t, dtype=torch.float32):
    return run(SLERP, make_values(SLERP, 1, t=t), base, [model], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distance", [1e-3, 1.0])
def test_ends_are_the_models_themselves(dtype, distance):
    base, (model,) = make_tensors(1, 5000, dtype, distance=distance)
    assert torch.equal(between(base, model, 0.0, dtype), base)
    assert torch.equal(between(base, model, 1.0, dtype), model)


def test_half_way_between_axes_lies_on_the_circle():
    middle = between(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    assert middle.tolist() == pytest.approx([math.sqrt(0.5)] * 2, rel=1e-6)
    third = between(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0]), 1 / 3)
    assert third.tolist() == pytest.approx([2 * math.cos(math.pi / 6), 2.0], rel=1e-6)


def test_equal_norms_are_kept_along_the_arc():
    base, (model,) = make_tensors(1, 5000, distance=0.1)
    model *= base.norm() / model.norm()
    for t in (0.1, 0.5, 0.9):
        assert between(base, model, t).norm().item() == pytest.approx(base.norm().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("base", "model"),
    [
        ([1.0], [-2.0]),  # one number has no angle
        ([0.0, 0.0], [1.0, 2.0]),  # zero: no direction
        ([1.0, 2.0], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([1.0, 2.0], [1.01, 2.0]),  # nearly parallel
    ],
)
def test_the_straight_line_is_taken_where_there_is_no_arc(base, model):
    base, model = torch.tensor(base), torch.tensor(model)
    assert torch.equal(between(base, model, 0.25), 0.25 * model + 0.75 * base)


@pytest.mark.parametrize(("cosine", "on_the_arc"), [(0.99949, True), (0.99951, False)])
def test_the_arc_ends_at_a_cosine_of_0_9995(cosine, on_the_arc):
    model = torch.tensor([cosine, math.sqrt(1 - cosine**2)], dtype=torch.float64).float()
    base = torch.tensor([1.0, 0.0])
    line = 0.5 * model + 0.5 * base
    assert torch.equal(between(base, model, 0.5), line) is not on_the_arc


@pytest.mark.parametrize(("cosine", "refused"), [(-0.99949, False), (-0.99951, True), (-1, True)])
def test_opposite_models_are_refused_with_tensor_models_and_cosine(cosine, refused):
    model = torch.tensor([cosine, math.sqrt(1 - cosine**2)])
    if not refused:
        assert between(torch.tensor([1.0, 0.0]), model, 0.5).isfinite().all()
        return
    sentence = rf"^{NAME}: base and parent-0 point in opposite .*{cosine:.4f}.*linear"
    with pytest.raises(MergeError, match=sentence):
        between(torch.tensor([1.0, 0.0]), model, 0.5)
    for t, end in ((0.0, torch.tensor([1.0, 0.0])), (1.0, model)):  # no arc is gone along
        assert torch.equal(between(torch.tensor([1.0, 0.0]), model, t), end)
