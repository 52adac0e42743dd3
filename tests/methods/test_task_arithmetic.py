import numpy as np
import pytest
import torch

from evomerge.methods import METHODS
from tests.contracts.merge_method import make_tensors, make_values, run

TASK_ARITHMETIC = METHODS["task_arithmetic"]


def whole_task_vector(base, parent, dtype):
    values = make_values(TASK_ARITHMETIC, 1, weight=(1.0,), **{"lambda": 1.0})
    return run(TASK_ARITHMETIC, values, base, [parent], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distance", [1e-3, 1.0])
def test_the_whole_task_vector_leads_to_a_half_precision_parent_exactly(dtype, distance):
    base, (parent,) = make_tensors(1, 50_000, dtype, distance=distance)
    assert torch.equal(whole_task_vector(base, parent, dtype), parent)


@pytest.mark.parametrize("distance", [1e-3, 1.0])
def test_the_whole_task_vector_leads_to_a_float32_parent_within_one_ulp(distance):
    """Subtracting and adding err by half an ulp each, of the larger of base, parent and delta."""
    base, (parent,) = make_tensors(1, 50_000, distance=distance)
    out = whole_task_vector(base, parent, torch.float32)
    sizes = torch.stack([base.abs(), parent.abs(), (parent - base).abs()])
    ulp = np.spacing(sizes.max(0).values.numpy())
    assert ((out - parent).abs().numpy() <= ulp).all()


def test_weights_that_cancel_leave_the_base():
    base, (parent,) = make_tensors(1, 1000)
    for normalize in (False, True):  # a sum of 0 counts as 1
        values = make_values(TASK_ARITHMETIC, 2, weight=(0.7, -0.7), normalize=normalize)
        assert torch.equal(run(TASK_ARITHMETIC, values, base, [parent, parent]), base)
    weights = (0.1, 0.2, -0.3)  # 6e-17 in floating point
    values = make_values(TASK_ARITHMETIC, 3, weight=weights, normalize=True)
    assert (run(TASK_ARITHMETIC, values, base, [parent] * 3) - base).abs().max() < 1e-7


def test_normalize_makes_proportions_of_weights():
    base, parents = make_tensors(2, 1000)
    one = make_values(TASK_ARITHMETIC, 2, weight=(2.0, 6.0), normalize=True)
    other = make_values(TASK_ARITHMETIC, 2, weight=(0.25, 0.75), normalize=False)
    assert torch.equal(
        run(TASK_ARITHMETIC, one, base, parents), run(TASK_ARITHMETIC, other, base, parents)
    )
