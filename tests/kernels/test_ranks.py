import numpy as np
import pytest
import torch

from evomerge.kernels import ranks
from evomerge.kernels.ranks import delta_ranks, row_ranks
from tests.contracts.textbook_elementwise import byte_ranks


def make_magnitudes(shape, num_values):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, num_values, shape, generator=generator).float()


@pytest.mark.parametrize(
    "shape", [(1,), (2,), (300,), (7, 60), (60, 1), (1, 1), (5, 8, 3)], ids=str
)
@pytest.mark.parametrize("num_values", [1, 3, 10**6])
def test_ranks_are_the_mean_places_among_equals(shape, num_values):
    magnitude = make_magnitudes(shape, num_values)
    found = row_ranks(magnitude.reshape(-1), shape)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy().reshape(shape), byte_ranks(magnitude.numpy()))


def test_ends_and_middle():
    assert row_ranks(torch.tensor([3.0, 1.0, 2.0]), (3,)).tolist() == [254, 0, 127]
    assert row_ranks(torch.ones(4), (2, 2)).tolist() == [127] * 4
    assert row_ranks(torch.zeros(0), (0, 3)).tolist() == []


def test_blocks_of_rows_make_no_difference(monkeypatch):
    magnitude = make_magnitudes((40, 30), 50).reshape(-1)
    whole = row_ranks(magnitude, (40, 30))
    monkeypatch.setattr(ranks, "_BLOCK", 100)
    assert torch.equal(row_ranks(magnitude, (40, 30)), whole)


@pytest.mark.parametrize("shape", [(300,), (7, 60), (1, 1), (5, 8, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ranks_of_a_task_vector_are_those_of_what_the_checkpoints_can_tell_apart(dtype, shape):
    generator = torch.Generator().manual_seed(6)
    base = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    parent = (base.float() + 1e-3 * torch.randn(shape, generator=generator)).to(dtype)
    rounded = (parent.double() - base.double()).float().abs().to(dtype).float()
    found = delta_ranks(base.reshape(-1), parent.reshape(-1), dtype, shape)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy().reshape(shape), byte_ranks(rounded.numpy()))
