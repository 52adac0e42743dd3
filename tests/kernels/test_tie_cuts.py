"""Elements that tie at a threshold: how many are kept, and which, against a stable sort."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from evomerge.kernels.masks import KEEP_ALL
from evomerge.kernels.reference import carry_out, kept_deltas
from evomerge.kernels.statistics import StatisticsCache, TensorStatistics
from evomerge.kernels.sums import PIECE
from evomerge.kernels.tables import Mask
from tests.contracts import textbook

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DENSITIES = [1e-6, 0.1, 0.37, 0.5, 0.999999]


def make_statistics(policy, size=20_000, dtype=torch.bfloat16, distance=1e-4, num_models=2, seed=7):
    """Parents so near the base that many task vectors' elements are equal."""
    generator = torch.Generator().manual_seed(size)
    base = torch.randn(size, generator=generator) * 0.02
    if dtype is torch.float32:
        base = torch.round(base * 2**16) / 2**16  # so that float32 differences are equal too
    deltas = [distance * torch.randn(size, generator=generator) for _ in range(num_models)]
    if dtype is torch.float32:
        deltas = [torch.round(delta * 2**16) / 2**16 for delta in deltas]
    parents = [(base + delta).to(dtype) for delta in deltas]
    names = tuple(f"parent-{i}" for i in range(num_models))
    return TensorStatistics(
        "tensor", base.to(dtype), parents, "base", names, seed, threshold_ties=policy
    )


def mask_of(statistics, densities, gammas=None):
    """The mask of ties or, with gammas, of breadcrumbs, with all weights 1."""
    if gammas is None:
        bands = [(statistics.threshold(i, d), math.inf) for i, d in enumerate(densities)]
    else:
        shares = zip(densities, gammas, strict=True)
        bands = [statistics.band(i, density, gamma) for i, (density, gamma) in enumerate(shares)]
    ones = (1.0,) * len(densities)
    return Mask(
        ones,
        ones,
        tuple(low for low, _ in bands),
        (KEEP_ALL,) * len(densities),
        statistics.mask_key,
        ceilings=tuple(high for _, high in bands),
        tie_cuts=statistics.tie_cuts(densities, gammas),
    )


def kept_by(statistics, densities, gammas=None):
    """Which elements of each parent stay, zeros left out."""
    mask = mask_of(statistics, densities, gammas)
    base = statistics.base_P.float()
    return [kept != 0 for kept in kept_deltas(mask, base, statistics.source_MP, 0)]


def stored(statistics, model):
    """Magnitudes at the precision in which they compare."""
    delta = statistics.source_MP[model].double() - statistics.base_P.double()
    return delta.float().abs().to(statistics.key_dtype(model)).double().numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 50, PIECE + 77])
@pytest.mark.parametrize("density", DENSITIES)
def test_index_keeps_exactly_as_many_and_the_first_of_those_that_tie(dtype, size, density):
    statistics = make_statistics("index", size, dtype)
    count = max(1, int(density * size))
    for model, kept in enumerate(kept_by(statistics, (density, density))):
        magnitude = stored(statistics, model)
        first = np.argsort(-magnitude, kind="stable")[:count]
        wanted = np.zeros(size, dtype=bool)
        wanted[first] = magnitude[first] > 0
        assert np.array_equal(kept.numpy(), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.1), (0.7, 0.05), (0.2, 0.5), (0.02, 0.98)])
def test_index_cuts_the_lower_end_of_a_band_and_leaves_the_upper(dtype, density, gamma):
    size = 5000
    statistics = make_statistics("index", size, dtype)
    kept = kept_by(statistics, (density,) * 2, (gamma,) * 2)
    for model in (0, 1):
        magnitude = stored(statistics, model)
        order = np.argsort(-magnitude, kind="stable")
        num_larger = min(int(gamma * size), size - int(density * size))
        end = num_larger + int(density * size)
        wanted = np.zeros(size, dtype=bool)
        wanted[order[:end]] = True
        # what ties with the largest one kept stays, though it would be among the dropped
        wanted &= (magnitude <= magnitude[order[num_larger]]) & (magnitude > 0)
        assert np.array_equal(kept[model].numpy(), wanted)


def test_keep_keeps_more_than_was_asked_where_elements_tie():
    """The case of `ties` in bfloat16 at a hundredth of the weights' size."""
    counts = {}
    for policy in ("keep", "index", "hash"):
        statistics = make_statistics(policy, size=100_000)
        counts[policy] = [int(kept.sum()) for kept in kept_by(statistics, (0.37, 0.37))]
    assert min(counts["keep"]) > 38_500
    assert counts["index"] == [37_000, 37_000]
    assert counts["hash"] != counts["index"]


def test_keep_cuts_nothing():
    statistics = make_statistics("keep")
    assert statistics.tie_cuts((0.37, 0.37)) == ()
    for policy in ("index", "hash"):
        ends = dataclasses.replace(statistics, threshold_ties=policy).tie_cuts((0.0, 1.0))
        assert ends == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.1, 0.37, 0.5])
def test_hash_keeps_those_with_the_lowest_random_numbers(dtype, density):
    size = 20_000
    statistics = make_statistics("hash", size, dtype)
    words = textbook.random_words(7, "tensor", 2, size)
    count = int(density * size)
    for model, kept in enumerate(kept_by(statistics, (density, density))):
        magnitude = stored(statistics, model)
        last = np.sort(magnitude)[-count]
        ties, above = magnitude == last, magnitude > last
        wanted = count - int(above.sum())
        share = wanted / ties.sum()
        lucky = words[model] < wanted * 2**32 // int(ties.sum())
        assert np.array_equal(kept.numpy(), above | (ties & lucky))
        # each that ties is kept by a throw of its own
        deviation = math.sqrt(ties.sum() * share * (1 - share))
        assert abs(int(kept.sum()) - count) <= 5 * deviation


def test_hash_depends_on_seed_and_position():
    first, second = kept_by(make_statistics("hash"), (0.37, 0.37))
    other, _ = kept_by(make_statistics("hash", seed=8), (0.37, 0.37))
    assert not torch.equal(first, other)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("policy", ["keep", "index", "hash"])
def test_more_density_keeps_what_less_density_kept(policy):
    statistics = make_statistics(policy)
    before = torch.zeros(20_000, dtype=torch.bool)
    for density in (0.0, 0.1, 0.365, 0.37, 0.375, 0.5, 0.51, 1.0):
        after, _ = kept_by(statistics, (density, 0.5))
        assert not bool((before & ~after).any())
        if policy != "keep" and density > 0:  # where all are kept, small steps change nothing
            assert after.sum() > before.sum()
        before = after


@pytest.mark.parametrize("policy", ["index", "hash"])
def test_chunks_do_not_matter(policy):
    statistics = make_statistics(policy, size=PIECE + 1001)
    table = dataclasses.replace(mask_of(statistics, (0.37, 0.2)), elect=True, normalize=True)
    outs = []
    for chunk in (10**9, 1001, 2**15):
        out = torch.full_like(statistics.base_P, math.nan)
        carry_out(table, statistics.base_P, statistics.source_MP, out, chunk=chunk)
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("policy", ["index", "hash"])
def test_rescales_look_at_what_a_cut_leaves(policy):
    cache = StatisticsCache()
    cut = dataclasses.replace(make_statistics(policy), cache=cache)
    keep = dataclasses.replace(cut, threshold_ties="keep")
    of_all = keep.rescales(mask_of(keep, (0.37, 0.37)))
    factors = cut.rescales(mask_of(cut, (0.37, 0.37)))
    for model, kept in enumerate(kept_by(cut, (0.37, 0.37))):
        delta = (cut.source_MP[model].double() - cut.base_P.double()).abs()
        assert factors[model] == pytest.approx(float(delta.sum() / delta[kept].sum()), rel=1e-12)
        assert factors[model] > of_all[model] * 1.0001  # not the other's out of the cache


def test_where_ties_end_is_looked_for_once():
    first = make_statistics("index")
    cuts = first.tie_cuts((0.37, 0.2))
    wiped = [torch.full_like(tensor, math.nan) for tensor in first.source_MP]
    assert dataclasses.replace(first, source_MP=wiped).tie_cuts((0.37, 0.2)) == cuts
    assert all(cut.end < 20_000 for cut in cuts)
