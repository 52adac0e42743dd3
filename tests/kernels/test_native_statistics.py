"""What C finds is bit for bit what torch finds; see the tests of sums, histograms and ranks too."""

import math
import os
from functools import partial

import numpy as np
import pytest
import torch

from evomerge.kernels import compiler, histograms, native_statistics, ranks, sums
from evomerge.kernels.masks import KEEP_ALL, MaskKey
from evomerge.kernels.sums import PIECE
from evomerge.kernels.tables import Fused, Mask, TieCut
from evomerge.methods import ram, sce

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# on both sides of a vector, a block, the halvings in registers (1024) and a piece
SIZES = [
    1,
    2,
    31,
    33,
    255,
    257,
    1000,
    1023,
    1024,
    1025,
    4096,
    PIECE - 1,
    PIECE,
    PIECE + 1,
    3 * PIECE + 777,
]
FEW = [1, 33, 1024, PIECE + 1, 3 * PIECE + 777]


@pytest.fixture(autouse=True)
def _compiled():
    if compiler.missing():
        pytest.skip(f"no C here: {compiler.missing()}")
    assert native_statistics.missing() is None


def by_torch(monkeypatch, compute):
    with monkeypatch.context() as patch:
        patch.setattr(native_statistics, "_library", lambda: None)
        return compute()


def assert_same(monkeypatch, compute, refused=False):
    """What is computed in C is what torch computes, bit for bit; and C did it."""
    calls = []
    run = native_statistics._run
    with monkeypatch.context() as patch:
        patch.setattr(native_statistics, "_run", lambda *a: (calls.append(a[0]), run(*a)))
        found = compute()
    assert bool(calls) is not refused
    expected = by_torch(monkeypatch, compute)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected), strict=True)


def make_models(dtypes, size, seed=1, distance=1e-3):
    """A base, as the first, and parents, with zeros and every edge of the dtypes among them."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator) * 0.02
    models = [base] + [base + distance * torch.randn(size, generator=generator) for _ in dtypes[1:]]
    models = [model.to(dtype) for model, dtype in zip(models, dtypes, strict=True)]
    for i, model in enumerate(models):
        info = torch.finfo(model.dtype)
        edges = [0.0, -0.0, info.max / 4, info.tiny, info.tiny / 8, -info.tiny / 2, 1.0]
        for j, edge in enumerate(edges):
            model[(i + 1) * j % size] = edge
    models[-1][size // 2 :] = models[0][size // 2 :].to(models[-1].dtype)  # nothing changed here
    return models[0], models[1:]


def mask_of(num_models, **fields):
    plain = {
        "scales": (1.0,) * num_models,
        "weights": (1.0,) * num_models,
        "thresholds": (0.0,) * num_models,
        "keep_levels": (KEEP_ALL,) * num_models,
        "key": MaskKey(4_000_000_007, "layer.weight"),
    }
    return Mask(**{**plain, **fields})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram(monkeypatch, dtype, size):
    base, parents = make_models([dtype] * 4, size)
    assert_same(monkeypatch, partial(sums.gram, base, parents))
    assert_same(monkeypatch, partial(sums.gram, None, parents))


def test_gram_of_many_models_of_several_dtypes(monkeypatch):
    base, parents = make_models([torch.float16, *DTYPES * 4], 300)
    assert_same(monkeypatch, partial(sums.gram, base, parents))


MASKS = {
    "all": mask_of(6),
    "thresholds": mask_of(6, thresholds=(0.0, 1e-3, 5e-4, math.inf, 1e-30, 2.0**-9)),
    "bands": mask_of(6, thresholds=(5e-4,) * 6, ceilings=(math.inf, 1e-3, 2e-3, 5e-4, 1.0, 0.0)),
    "levels": mask_of(6, keep_levels=(2**31, 1, KEEP_ALL, 0, KEEP_ALL - 1, 2**30 + 12345)),
    "both": mask_of(6, thresholds=(1e-3,) * 6, keep_levels=(2**31,) * 6),
    "cuts": mask_of(
        6,
        thresholds=(5e-4,) * 6,
        keep_levels=(KEEP_ALL, KEEP_ALL, 2**31, KEEP_ALL, KEEP_ALL, 2**30),
        tie_cuts=(
            None,
            TieCut(1e-3, end=40_000),
            TieCut(1e-3, level=2**31),
            TieCut(1e-3, end=0),
            TieCut(1e-3, level=0),
            TieCut(1e-3, end=100, level=2**29),
        ),
    ),
}


@pytest.mark.parametrize("size", FEW)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_l1_norms(monkeypatch, mask, dtype, size):
    base, parents = make_models([dtype] * 7, size)
    for models in (range(6), (1, 4, 5), (5,)):
        assert_same(monkeypatch, partial(sums.l1_norms, mask, base, parents, models))


@pytest.mark.parametrize("level", [1, 2**31, KEEP_ALL - 255 * 2**20])
@pytest.mark.parametrize("step", [0, 1, 2**20])
def test_l1_norms_by_ranks(monkeypatch, level, step):
    size = PIECE + 999
    base, parents = make_models([torch.bfloat16] * 3, size)
    rank = torch.randint(0, 255, (size,), dtype=torch.uint8, generator=torch.manual_seed(3))
    rank[:2] = torch.tensor([0, 254])
    mask = mask_of(2, keep_levels=(level, 2**31), rank_steps=(step, 0), ranks=(rank, None))
    assert_same(monkeypatch, partial(sums.l1_norms, mask, base, parents, (0, 1)))


def test_levels_beyond_32_bits_are_left_to_torch(monkeypatch):
    base, parents = make_models([torch.bfloat16] * 2, 500)
    rank = torch.full((500,), 254, dtype=torch.uint8)
    for level, step in ((KEEP_ALL - 1, 1), (1000, -10)):
        mask = mask_of(1, keep_levels=(level,), rank_steps=(step,), ranks=(rank,))
        norms = partial(sums.l1_norms, mask, base, parents, (0,))
        assert_same(monkeypatch, norms, refused=True)


EXPRESSIONS = {
    "varying": (sce._varying, Fused("sce varying")),
    "energies": (partial(sce._squares, threshold=1e-6), Fused("sce squares", shared=(1e-6,))),
    "no energy": (
        partial(sce._squares, threshold=math.inf),
        Fused("sce squares", shared=(math.inf,)),
    ),
    # no float32 number
    "shares": (partial(ram._shares, epsilon=1e-3), Fused("ram shares", shared=(1e-3,))),
    "all shares": (partial(ram._shares, epsilon=0.0), Fused("ram shares", shared=(0.0,))),
}


@pytest.mark.parametrize("size", FEW)
@pytest.mark.parametrize("num_models", [1, 2, 3, 7])
@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS.keys())
def test_term_sums(monkeypatch, expression, num_models, size):
    for dtype in DTYPES:
        base, parents = make_models([dtype] * (num_models + 1), size)
        assert_same(monkeypatch, partial(sums.term_sums, base, parents, *expression))


def test_an_epsilon_between_two_floats_counts_as_the_one_that_torch_takes(monkeypatch):
    """Magnitudes next to epsilon, which is no float32 number itself."""
    epsilon = 1e-5
    nearest = np.float32(epsilon)
    around = [np.nextafter(nearest, np.float32(0)), nearest, np.nextafter(nearest, np.float32(1))]
    base, parent = torch.zeros(3), torch.from_numpy(np.array(around))
    terms, fused = partial(ram._shares, epsilon=epsilon), Fused("ram shares", shared=(epsilon,))
    assert_same(monkeypatch, partial(sums.term_sums, base, [parent], terms, fused))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts(monkeypatch, dtype, size):
    base, (parent,) = make_models([dtype] * 2, size)
    count = partial(histograms.count_magnitudes, base, parent)
    assert_same(monkeypatch, lambda: columns(count(dtype)))
    assert_same(monkeypatch, lambda: columns(count(torch.float32)))
    for within in count(torch.float32).keys[:40:7]:
        assert_same(monkeypatch, lambda within=within: columns(count(torch.float32, int(within))))


def columns(histogram):
    return [histogram.keys.astype(np.int64), histogram.counts]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_counts_round_every_kind_of_magnitude_as_torch_does(monkeypatch, dtype):
    """All exponents, with fractions at, below and above every half-way point."""
    upper = torch.arange(0, 2**15 - 127, dtype=torch.int32) << 16  # up to infinity, no NaN
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = upper[:, None] + lower.int()
    bits = bits[bits <= 0x7F800000].contiguous()
    magnitude = bits.view(torch.float32)
    base = torch.zeros_like(magnitude)
    # of a 16-bit dtype only where both are; here its keys are of float32 numbers
    found = native_statistics.counts(base, [magnitude], 0, dtype, None)
    expected = histograms.count_keys([magnitude], dtype)
    np.testing.assert_array_equal(columns(histograms._occupied(found)), columns(expected))


@pytest.mark.parametrize("num_models", [1, 2, 5])
@pytest.mark.parametrize("size", FEW)
def test_counts_of_spreads(monkeypatch, num_models, size):
    base, parents = make_models([torch.bfloat16] * (num_models + 1), size)
    count = partial(histograms.count_numbers, base, parents, "spread", sce.spread)
    assert_same(monkeypatch, lambda: columns(count()))
    within = int(count().keys[0])
    assert_same(monkeypatch, lambda: columns(count(within)))


SHAPES = [(1,), (2,), (700,), (7, 60), (60, 1), (1, 1), (5, 8, 3), (3, 4, 5, 2), (4, 5000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distance", [0.0, 1e-4, 1.0])
def test_ranks(monkeypatch, distance, dtype, shape):
    base, (parent,) = make_models([dtype] * 2, math.prod(shape), distance=distance)
    assert_same(monkeypatch, partial(ranks.delta_ranks, base, parent, dtype, shape))
    if dtype is torch.float16:
        mixed = partial(ranks.delta_ranks, base.float(), parent, torch.float32, shape)
        assert_same(monkeypatch, mixed)


def test_ranks_in_one_row_of_the_size_of_the_largest_and_of_one_key(monkeypatch):
    size = 2**17 + 3
    base, (parent,) = make_models([torch.bfloat16] * 2, size)
    for other in (parent, base):
        for dtype in (torch.bfloat16, torch.float32):
            rank = partial(ranks.delta_ranks, base.to(dtype), other.to(dtype), dtype, (size,))
            assert_same(monkeypatch, rank)


def test_threads_make_no_difference(monkeypatch):
    monkeypatch.setattr(native_statistics, "_LEAST_PER_THREAD", PIECE)
    size = 10 * PIECE + 77 * 5
    base, parents = make_models([torch.bfloat16] * 4, size)
    mask = mask_of(3, keep_levels=(2**31, 2**30, KEEP_ALL), thresholds=(0.0, 0.0, 1e-3))
    facts = (
        partial(sums.gram, base, parents),
        partial(sums.l1_norms, mask, base, parents, range(3)),
        lambda: columns(histograms.count_magnitudes(base, parents[0], torch.bfloat16)),
        partial(ranks.delta_ranks, base, parents[0], torch.bfloat16, (size // 5, 5)),
    )
    alone = [fact() for fact in facts]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for one, fact in zip(alone, facts, strict=True):
        assert len(native_statistics._parts(10, 1)) == 3
        np.testing.assert_array_equal(np.asarray(fact()), np.asarray(one))


def test_what_c_cannot_read_is_left_to_torch(monkeypatch):
    base, parents = make_models([torch.float32] * 3, 1000)
    gram = partial(sums.gram, base.double(), parents)
    assert_same(monkeypatch, gram, refused=True)
    strided = [torch.stack([parent, parent], dim=1)[:, 0] for parent in parents]
    assert_same(monkeypatch, partial(sums.gram, base, strided), refused=True)
    assert sums.gram(base, strided) == sums.gram(base, parents)
    many = [parents[0]] * (native_statistics.MAX_MODELS + 1)
    norms = partial(sums.l1_norms, mask_of(len(many)), base, many, range(len(many)))
    assert_same(monkeypatch, norms, refused=True)
    assert_same(monkeypatch, partial(sums.gram, base[:0], [base[:0]]), refused=True)


def test_without_a_compiler_the_numbers_are_the_same(monkeypatch):
    """A machine without one: `CC` names what is not there."""
    base, parents = make_models([torch.bfloat16] * 3, 5000)
    expected = sums.gram(base, parents)
    monkeypatch.setitem(os.environ, "CC", "no-such-compiler")
    for cached in (compiler._compiler, compiler._library, native_statistics._library):
        cached.cache_clear()
    try:
        assert native_statistics.missing() is not None
        assert native_statistics.gram(base, parents) is None
        assert sums.gram(base, parents) == expected
    finally:
        for cached in (compiler._compiler, compiler._library, native_statistics._library):
            cached.cache_clear()
