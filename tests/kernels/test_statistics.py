import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.kernels import sums
from evomerge.kernels.histograms import smallest_rounding_to
from evomerge.kernels.masks import KEEP_ALL, keep_level
from evomerge.kernels.reference import is_finite
from evomerge.kernels.statistics import Everything, StatisticsCache, TensorStatistics
from evomerge.kernels.sums import PIECE, tree_sum
from evomerge.kernels.tables import Mask
from tests.contracts import textbook

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_statistics(num_models=2, size=5000, dtype=torch.float32, distance=1e-3, cache=None):
    generator = torch.Generator().manual_seed(size)
    base = torch.randn(size, generator=generator) * 0.02
    parents = [
        (base + distance * torch.randn(size, generator=generator)).to(dtype)
        for _ in range(num_models)
    ]
    names = tuple(f"parent-{i}" for i in range(num_models))
    return TensorStatistics(
        "tensor", base.to(dtype), parents, "base", names, 7, cache or StatisticsCache()
    )


def dropping(statistics, thresholds, keep_levels, **fields):
    """A mask of which only what it keeps matters."""
    ones = (1.0,) * len(thresholds)
    return Mask(ones, ones, thresholds, keep_levels, statistics.mask_key, **fields)


def magnitudes(statistics, model, dtype):
    """|parent - base| as a checkpoint of this dtype would hold it."""
    delta = statistics.source_MP[model].double() - statistics.base_P.double()
    return delta.float().abs().to(dtype).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 50, PIECE + 77])
@pytest.mark.parametrize("density", [1e-6, 0.1, 0.37, 0.5, 0.999999])
def test_threshold_keeps_the_largest_and_what_equals_the_last_of_them(dtype, size, density):
    statistics = make_statistics(size=size, dtype=dtype)
    for model in (0, 1):
        ranked = magnitudes(statistics, model, dtype).sort(descending=True).values
        last = ranked[max(1, int(density * size)) - 1]
        threshold = np.float32(statistics.threshold(model, density))
        delta = (statistics.source_MP[model].float() - statistics.base_P.float()).abs()
        kept = torch.from_numpy(delta.numpy() >= threshold)
        assert torch.equal(kept, delta.to(dtype).double() >= last)


def test_half_precision_ties_are_the_rule_and_kept_together():
    statistics = make_statistics(size=20_000, dtype=torch.bfloat16, distance=1e-4)
    threshold = statistics.threshold(0, 0.2)
    delta = (statistics.source_MP[0].float() - statistics.base_P.float()).abs()
    num_kept = (delta >= threshold).sum().item()
    assert num_kept > 4000
    assert (delta.bfloat16() > torch.tensor(threshold).bfloat16()).sum() < 4000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 50, 5000])
@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.1), (0.9, 0.5), (0.5, 0.0), (0.02, 0.98)])
def test_band_keeps_what_equals_the_ranks_between(dtype, size, density, gamma):
    statistics = make_statistics(size=size, dtype=dtype)
    ranked = magnitudes(statistics, 0, dtype).sort().values
    count = int(density * size)
    bottom = max(0, size - count - int(gamma * size))
    threshold, ceiling = statistics.band(0, density, gamma)
    delta = (statistics.source_MP[0].float() - statistics.base_P.float()).abs()
    kept = (delta >= threshold) & (delta < ceiling)
    if count == 0:
        assert not kept.any()
        return
    between = ranked[bottom : bottom + count]
    stored = delta.to(dtype).double()
    assert torch.equal(kept, (stored >= between[0]) & (stored <= between[-1]))
    assert kept.sum() >= count


def tensors_of(dtypes, cache):
    """A whole model: tensors of several sizes and scales."""
    parts = []
    everything = Everything("model", lambda: parts)
    for i, dtype in enumerate(dtypes):
        made = make_statistics(size=1000 * (i + 1), dtype=dtype, distance=10.0**-i, cache=cache)
        parts.append(dataclasses.replace(made, name=f"tensor-{i}", everything=everything))
    return parts


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float32, torch.float16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("density", [1e-9, 0.1, 0.4, 0.9])
def test_whole_threshold_keeps_the_largest_of_all_tensors(dtypes, density):
    parts = tensors_of(dtypes, StatisticsCache())
    dtype = dtypes[0] if len(set(dtypes)) == 1 else torch.float32
    stored = torch.cat([magnitudes(part, 1, dtype) for part in parts])
    last = stored.sort(descending=True).values[max(1, int(density * len(stored))) - 1]
    threshold = parts[0].whole_threshold(1, density)
    for part in parts:
        assert part.whole_threshold(1, density) == threshold
        delta = (part.source_MP[1].float() - part.base_P.float()).abs()
        assert torch.equal(delta >= threshold, magnitudes(part, 1, dtype) >= last)


def test_whole_threshold_ends_and_a_tensor_of_its_own():
    part = tensors_of((torch.float32,) * 2, StatisticsCache())[0]
    assert (part.whole_threshold(0, 0.0), part.whole_threshold(0, 1.0)) == (math.inf, 0.0)
    alone = dataclasses.replace(part, everything=None)
    assert alone.whole_threshold(0, 0.3) == alone.threshold(0, 0.3)
    assert part.whole_threshold(0, 0.3) != alone.threshold(0, 0.3)


def test_threshold_ends():
    statistics = make_statistics()
    assert statistics.threshold(0, 0.0) == math.inf
    assert statistics.threshold(0, 1.0) == 0.0
    nothing = TensorStatistics("empty", torch.zeros(0), [torch.zeros(0)], "base", ("parent",))
    assert nothing.threshold(0, 0.5) == 0.0


def test_magnitudes_are_compared_in_float32_when_only_one_side_is_half():
    statistics = make_statistics(size=1001)
    mixed = TensorStatistics(
        "mixed", statistics.base_P, [statistics.source_MP[0].bfloat16()], "base", ("parent",)
    )
    delta = (mixed.source_MP[0].float() - mixed.base_P).abs()
    assert mixed.threshold(0, 0.3) == delta.sort(descending=True).values[299].item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_smallest_rounding_to_is_the_edge_for_every_number(dtype):
    infinity = 0x7F80 if dtype is torch.bfloat16 else 0x7C00
    keys = torch.arange(1, infinity + 1, dtype=torch.int16)
    edges = np.array([smallest_rounding_to(int(key), dtype) for key in keys], dtype=np.float32)
    below = np.nextafter(edges, np.float32(0))
    assert torch.equal(torch.from_numpy(edges).to(dtype).view(torch.int16), keys)
    assert torch.equal(torch.from_numpy(below).to(dtype).view(torch.int16), keys - 1)
    assert smallest_rounding_to(0, dtype) == 0.0


def test_gram_is_exact_where_parents_hardly_differ():
    statistics = make_statistics(num_models=3, size=PIECE + 1001, distance=1e-6)
    base = statistics.base_P.double().numpy()
    rows = [base, *((s - statistics.base_P).double().numpy() for s in statistics.source_MP)]
    gram = np.array(statistics.gram())
    expected = np.array([[math.fsum(a * b) for b in rows] for a in rows])
    assert np.abs(gram / expected - 1).max() < 1e-13
    assert np.array_equal(gram, gram.T)


@given(st.lists(st.floats(-1e6, 1e6), max_size=200))
def test_tree_sum_adds_everything_once(values):
    bound = 1e-15 * 10 * sum(map(abs, values))
    total = tree_sum(torch.tensor(values, dtype=torch.float64))
    assert abs(total - math.fsum(values)) <= bound


def test_rescales_restore_the_l1_norm():
    statistics = make_statistics(num_models=3, size=PIECE + 500)
    deltas = [(s - statistics.base_P).double().abs() for s in statistics.source_MP]
    words = torch.from_numpy(textbook.random_words(7, "tensor", 3, PIECE + 500))
    thresholds, levels = (0.0, 1e-3, 5e-4), (keep_level(0.3), KEEP_ALL, keep_level(0.8))
    kept = [
        delta[(delta >= threshold) & (word < level)]
        for delta, threshold, word, level in zip(deltas, thresholds, words, levels, strict=True)
    ]
    expected = [(d.sum() / k.sum()).item() for d, k in zip(deltas, kept, strict=True)]
    assert statistics.rescales(dropping(statistics, thresholds, levels)) == pytest.approx(
        expected, rel=1e-12
    )


def test_rescales_leave_alone_what_is_next_to_nothing():
    statistics = make_statistics(size=100, distance=1e-10)
    assert statistics.rescales(
        dropping(statistics, (0.0, math.inf), (keep_level(0.5), KEEP_ALL))
    ) == (1.0, 1.0)
    statistics = make_statistics(size=100)
    assert statistics.rescales(dropping(statistics, (0.0, 0.0), (KEEP_ALL, 0))) == (1.0, 1.0)


def test_rescales_read_nothing_where_nothing_is_dropped(monkeypatch):
    read = []
    norms = sums.l1_norms
    monkeypatch.setattr(sums, "l1_norms", lambda *a: (read.append(a[3]), norms(*a))[1])
    statistics = make_statistics(num_models=3)
    assert statistics.rescales(dropping(statistics, (0.0,) * 3, (KEEP_ALL,) * 3)) == (1.0,) * 3
    assert read == []
    factors = statistics.rescales(dropping(statistics, (0.0, 1e-3, 0.0), (KEEP_ALL,) * 3))
    assert read == [(0, 1, 2), (1,)]
    assert factors[1] > 1.0
    assert factors[::2] == (1.0, 1.0)


def test_each_model_loses_the_same_with_and_without_the_others():
    """Norms are of the models that lose anything, by their own lanes of random numbers."""
    statistics = make_statistics(num_models=6, size=3000)
    some, none = keep_level(0.4), KEEP_ALL
    together = statistics.rescales(dropping(statistics, (0.0,) * 6, (some,) * 6))
    for model in range(6):
        levels = tuple(some if i == model else none for i in range(6))
        alone = statistics.rescales(dropping(statistics, (0.0,) * 6, levels))
        assert alone == tuple(together[i] if i == model else 1.0 for i in range(6))


def test_masks_of_two_seeds_are_not_taken_for_each_other():
    cache = StatisticsCache()
    first = make_statistics(cache=cache)
    other = TensorStatistics(
        "tensor", first.base_P, first.source_MP, "base", first.models, 8, cache
    )
    again = make_statistics()
    arguments = (0.0, 0.0), (keep_level(0.5), keep_level(0.5))
    ours, others, anew = (s.rescales(dropping(s, *arguments)) for s in (first, other, again))
    assert ours != others
    assert ours == anew


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_prepared_twice(dtype):
    """Facts survive the tensors: a second view with other contents sees what the first found."""
    cache = StatisticsCache()
    first = make_statistics(dtype=dtype, cache=cache)
    levels = (keep_level(0.5), keep_level(0.4))
    facts = (
        first.gram(),
        first.threshold(0, 0.3),
        first.rescales(dropping(first, (0.0, 0.0), levels)),
    )
    wiped = [torch.full_like(tensor, math.nan) for tensor in first.source_MP]
    second = TensorStatistics(
        "tensor", first.base_P * math.nan, wiped, "base", first.models, 7, cache
    )
    assert (second.gram(), second.threshold(0, 0.3)) == facts[:2]
    assert second.rescales(dropping(second, (0.0, 0.0), levels)) == facts[2]


def test_cache_forgets_masked_norms_but_no_facts():
    cache = StatisticsCache(max_norms=2)
    computed = []
    for key in ("a", "b", "c", "a", "c"):
        cache.norm(key, lambda key=key: computed.append(key))
        cache.fact("fact", lambda: computed.append("fact"))
    assert computed == ["a", "fact", "b", "c", "a"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_is_finite_sees_one_bad_number_anywhere(dtype, bad):
    largest = torch.full((PIECE + 3,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(largest)  # its sum is not
    for place in (0, PIECE - 1, PIECE + 2):
        tensor = torch.zeros(PIECE + 3, dtype=dtype)
        assert is_finite(tensor)
        tensor[place] = bad
        assert not is_finite(tensor)
    assert not is_finite(torch.tensor([math.inf, -math.inf]))
