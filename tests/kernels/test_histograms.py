import numpy as np
import pytest
import torch

from evomerge.kernels import native_statistics
from evomerge.kernels.histograms import (
    added,
    count_keys,
    count_magnitudes,
    count_numbers,
    key_at,
    smallest_with,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["in C if there is a compiler", "by torch"], autouse=True)
def _each_way(request, monkeypatch):
    if request.param == "by torch":
        monkeypatch.setattr(native_statistics, "_library", lambda: None)


def make_models(dtype, size=3000):
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(size, generator=generator) * 0.02
    parent = base + 1e-3 * torch.randn(size, generator=generator)
    return base.to(dtype), parent.to(dtype)


def magnitudes(base, parent, dtype):
    """|parent - base|, exact, then rounded once: what is ranked."""
    exact = parent.double() - base.double()
    return exact.float().abs().to(dtype).float().numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_say_how_many_are_as_large(dtype):
    base, parent = make_models(dtype)
    histogram = count_magnitudes(base, parent, dtype)
    sizes = magnitudes(base, parent, dtype)
    assert (np.diff(histogram.keys) < 0).all()
    for key, count in zip(histogram.keys, histogram.counts, strict=True):
        number = np.float32(smallest_with(int(key) << 16, torch.float32))
        if dtype is not torch.float32:
            number = torch.tensor([int(key)], dtype=torch.int16).view(dtype).float().numpy()[0]
        assert count == (sizes >= number).sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 1500, 2999, 3000])
def test_key_at_is_that_of_the_number_at_this_place(dtype, rank):
    base, parent = make_models(dtype)
    key = key_at(rank, dtype, lambda within: count_magnitudes(base, parent, dtype, within))
    number = np.sort(magnitudes(base, parent, dtype))[-rank]
    edge = smallest_with(key, dtype)
    assert torch.tensor([edge], dtype=torch.float32).to(dtype).float().item() == number


def test_histograms_of_parts_add_up():
    base, parent = make_models(torch.bfloat16)
    whole = count_magnitudes(base, parent, torch.bfloat16)
    parts = [
        count_magnitudes(base[part], parent[part], torch.bfloat16)
        for part in (slice(0, 700), slice(700, 701), slice(701, None))
    ]
    total = added(parts)
    assert np.array_equal(total.keys, whole.keys)
    assert np.array_equal(total.counts, whole.counts)


def test_numbers_of_an_expression_are_counted():
    base, parent = make_models(torch.float32)
    found = count_numbers(base, [parent, base], "sum", lambda deltas: (deltas[0] + deltas[1]).abs())
    expected = count_keys([(parent - base).abs()], torch.float32)
    assert np.array_equal(found.keys, expected.keys)
    assert np.array_equal(found.counts, expected.counts)
