import pytest
import torch

from evomerge.kernels.statistics import StatisticsCache
from evomerge.methods import METHODS
from evomerge.methods.fourier import high_pass
from tests.contracts.merge_method import make_tensors, make_values, run

FOURIER, TASK_ARITHMETIC = METHODS["fourier"], METHODS["task_arithmetic"]
SHAPES = pytest.mark.parametrize("shape", [(40,), (41,), (16, 24), (15, 9), (4, 6, 10)], ids=str)


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@SHAPES
def test_a_cutoff_of_0_is_task_arithmetic(shape):
    base, parents = make_tensors(3, shape)
    out = run(FOURIER, make_values(FOURIER, 3, cutoff=0.0), base, parents)
    plain = run(TASK_ARITHMETIC, make_values(TASK_ARITHMETIC, 3), base, parents)
    assert torch.allclose(out, plain, rtol=1e-6, atol=1e-8)


@SHAPES
def test_what_passes_and_what_does_not_are_orthogonal_and_add_up(shape):
    delta = random(shape)
    high = high_pass(delta, 0.4)
    low = delta - high
    assert abs((high * low).sum()) < 1e-10 * delta.square().sum()
    assert 0 < high.norm() < delta.norm()
    assert torch.allclose(high_pass(high, 0.4), high, atol=1e-12)  # nothing left to cut
    assert high_pass(low, 0.4).norm() < 1e-12 * delta.norm()


def test_the_filter_is_linear():
    x, y = random((16, 24)), random((16, 24), seed=1)
    both = high_pass(2 * x - 3 * y, 0.3)
    assert torch.allclose(both, 2 * high_pass(x, 0.3) - 3 * high_pass(y, 0.3), atol=1e-12)


def test_a_wave_passes_by_its_frequency():
    rows, columns = torch.arange(32.0)[:, None], torch.arange(64.0)[None]
    wave = torch.cos(2 * torch.pi * (4 * rows / 32 + 8 * columns / 64)).double()
    radius = (2 * 0.25**2) ** 0.5  # each a quarter of the highest frequency
    assert torch.allclose(high_pass(wave, radius), wave, atol=1e-6)
    assert high_pass(wave, radius * 1.001).norm() < 1e-5 * wave.norm()


def test_the_norm_is_kept_where_asked_for():
    base, (parent,) = make_tensors(1, (16, 24))
    alone = {"weight": (1.0,), "lambda": 1.0, "cutoff": 0.6}
    for keep_norm in (False, True):
        values = make_values(FOURIER, 1, **alone, keep_norm=keep_norm)
        left = (run(FOURIER, values, base, [parent]) - base).norm() / (parent - base).norm()
        assert (left.item() == pytest.approx(1.0, rel=1e-5)) is keep_norm


def test_another_order_of_columns_is_another_merge():
    """The caution in the method's own words: frequencies hang on an order that means nothing."""
    base, parents = make_tensors(2, (16, 24))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    values = make_values(FOURIER, 2, cutoff=0.5)
    out = run(FOURIER, values, base, parents)
    permuted = run(FOURIER, values, base[:, order], [parent[:, order] for parent in parents])
    assert (permuted - out[:, order]).norm() > 0.1 * (out - base).norm()


def test_a_search_transforms_each_task_vector_once_per_cutoff(monkeypatch):
    base, parents = make_tensors(2, (16, 24))
    calls, transform = [], torch.fft.rfftn
    monkeypatch.setattr(torch.fft, "rfftn", lambda *a, **k: calls.append(1) or transform(*a, **k))
    cache = StatisticsCache()
    for weight, cutoff, num_calls in ((0.1, 0.2, 2), (0.7, 0.2, 2), (0.7, 0.3, 4), (0.7, 0.2, 6)):
        values = make_values(FOURIER, 2, weight=(weight, 0.3), cutoff=cutoff)
        out = run(FOURIER, values, base, parents, cache=cache)
        assert len(calls) == num_calls  # one cutoff is kept, not all there were
        assert torch.equal(out, run(FOURIER, values, base, parents))
        del calls[num_calls:]
