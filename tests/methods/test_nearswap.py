import pytest
import torch

from evomerge.methods import METHODS
from tests.contracts.merge_method import make_tensors, make_values, run

NEARSWAP = METHODS["nearswap"]


def swapped(base, model, t, dtype=torch.float32):
    return run(NEARSWAP, make_values(NEARSWAP, 1, t=t), base, [model], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ends_are_the_models_themselves(dtype):
    base, (model,) = make_tensors(1, 5000, dtype)
    assert torch.equal(swapped(base, model, 0.0, dtype), base)
    assert torch.equal(swapped(base, model, 10.0, dtype), model)


def test_near_elements_are_taken_over_and_others_moved_by_t():
    base, model = torch.tensor([0.0, 1.0, -1.0, 2.0]), torch.tensor([0.25, 1.5, -3.0, 2.0])
    assert swapped(base, model, 0.5).tolist() == pytest.approx([0.25, 1.5, -1.5, 2.0], rel=1e-6)
    assert swapped(base, model, 0.5)[1] == 1.5  # a distance of exactly t
