import pytest
import torch

from evomerge.methods import METHODS
from tests.contracts.merge_method import make_tensors, make_values, run

PASSTHROUGH = METHODS["passthrough"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gives_back_every_bit(dtype):
    base, (model,) = make_tensors(1, 5000, dtype)
    model[:3] = torch.tensor([-0.0, 6e-8, torch.finfo(dtype).max], dtype=dtype)
    out = run(PASSTHROUGH, make_values(PASSTHROUGH, 1, scale=(1.0,)), base, [model], dtype)
    assert torch.equal(out.view(torch.uint8), model.view(torch.uint8))


def test_scale_multiplies():
    base, (model,) = make_tensors(1, 5000)
    out = run(PASSTHROUGH, make_values(PASSTHROUGH, 1, scale=(-0.5,)), base, [model])
    assert torch.equal(out, model * -0.5)
