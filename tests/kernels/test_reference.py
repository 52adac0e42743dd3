"""The kernels against numpy float32, operation by operation: equal in every bit."""

import math

import numpy as np
import pytest
import torch

from evomerge.kernels.masks import KEEP_ALL, MaskKey, keep_level
from evomerge.kernels.reference import carry_out, ranges
from evomerge.kernels.tables import Mask, Span
from tests.contracts import textbook

KEY = MaskKey(3, "tensor")
F = np.float32


def make_sources(num_models, size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(size)
    tensors = torch.randn(num_models + 1, size, generator=generator).to(dtype)
    return tensors[0], list(tensors[1:])


def carried_out(table, base, sources, dtype=torch.float32):
    out = torch.full((len(sources[0]),), math.nan, dtype=dtype)
    carry_out(table, base, sources, out)
    return out


def numpy_span(table, base, sources):
    total = None
    for coefficient, source in zip(table.coefficients, sources, strict=True):
        value = source.float().numpy()
        if table.deltas:
            value = value - base.float().numpy()
        term = F(coefficient) * value
        total = term if total is None else total + term
    return total if base is None else total + F(table.base) * base.float().numpy()


def numpy_mask(table, base, sources):
    words = textbook.random_words(KEY.seed, KEY.tensor, len(sources), len(base))
    ceilings = table.ceilings or (math.inf,) * len(sources)
    steps = table.rank_steps or (0,) * len(sources)
    start = base.float().numpy()
    kept = []
    for i, source in enumerate(sources):
        delta = source.float().numpy() - start
        rank = 0 if not steps[i] else table.ranks[i].numpy().astype(np.float64)
        keep = (np.abs(delta) >= F(table.thresholds[i])) & (np.abs(delta) < F(ceilings[i]))
        keep &= words[i] < table.keep_levels[i] + steps[i] * rank
        kept.append(np.where(keep, delta, F(0)) * F(table.scales[i]))
    if not table.elect:
        return start + F(table.lam) * sum_in_order(kept)
    plus = sum_in_order([np.maximum(term, F(0)) for term in kept])
    minus = sum_in_order([np.minimum(term, F(0)) for term in kept])
    merged = np.where(plus + minus >= 0, plus, minus)
    if table.normalize:
        weights = [F(weight) for weight in table.weights]
        above = sum_in_order([np.where(t > 0, w, F(0)) for w, t in zip(weights, kept, strict=True)])
        below = sum_in_order([np.where(t < 0, w, F(0)) for w, t in zip(weights, kept, strict=True)])
        divisor = np.where(plus + minus >= 0, above, below)
        merged = merged / np.where(divisor == 0, F(1), divisor)
    return start + F(table.lam) * merged


def sum_in_order(terms):
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


SPANS = [
    Span((0.1, 0.7, -0.3)),
    Span((0.1, 0.7, -0.3), base=1.0, deltas=True),
    Span((1 / 3, 2 / 3, 1e-3), base=0.3),
]
LEVELS = (keep_level(0.3), KEEP_ALL, keep_level(0.9), 0, keep_level(0.5))
WEIGHTS = (0.1, 0.7, 0.2, 0.4, 1 / 3)
MASKS = [
    Mask(WEIGHTS, WEIGHTS, (0.0,) * 5, LEVELS, KEY),
    Mask(WEIGHTS, WEIGHTS, (0.0, 1.1, math.inf, 0.3, 0.0), LEVELS, KEY, lam=0.7),
    Mask(WEIGHTS, WEIGHTS, (0.5,) * 5, (KEEP_ALL,) * 5, KEY, elect=True),
    Mask((0.2, -0.9, 1.3, 0.1, 0.4), (0.1, -0.7, 0.6, 0.1, 0.2), (0.0, 1.1, 0.2, 0.3, 0.0), LEVELS,
         KEY, elect=True, normalize=True, lam=1.2),
    Mask(WEIGHTS, WEIGHTS, (0.5,) * 5, (KEEP_ALL,) * 5, KEY, elect=True,
         ceilings=(1.1, math.inf, 0.9, 0.5, 2.0)),
]  # fmt: skip


@pytest.mark.parametrize("table", SPANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0, 1, 31, 40_001])
def test_span_is_what_numpy_computes(table, dtype, size):
    base, sources = make_sources(3, size, dtype)
    if table == SPANS[0]:
        base = None
    out = carried_out(table, base, sources)
    assert np.array_equal(out.numpy(), numpy_span(table, base, sources))


@pytest.mark.parametrize("table", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0, 1, 31, 40_001])
def test_mask_is_what_numpy_computes(table, dtype, size):
    base, sources = make_sources(5, size, dtype)
    out = carried_out(table, base, sources)
    assert np.array_equal(out.numpy(), numpy_mask(table, base, sources))


@pytest.mark.parametrize("size", [1, 31, 40_001])
def test_ranks_raise_the_keep_level(size):
    base, sources = make_sources(5, size)
    generator = torch.Generator().manual_seed(1)
    ranks = torch.randint(0, 255, (5, size), generator=generator, dtype=torch.uint8)
    table = Mask(
        WEIGHTS,
        WEIGHTS,
        (0.0,) * 5,
        (1, 2**30, KEEP_ALL, 0, keep_level(0.5)),
        KEY,
        rank_steps=(2**24, 2**22 + 1, 0, 0, 2**23),
        ranks=(ranks[0], ranks[1], None, None, ranks[4]),
    )
    out = carried_out(table, base, sources)
    assert np.array_equal(out.numpy(), numpy_mask(table, base, sources))


@pytest.mark.parametrize("ceiling", [0.25, 1e-45, 3e-39])
def test_a_magnitude_equal_to_the_ceiling_is_dropped(ceiling):
    below = float(np.nextafter(F(ceiling), F(0)))
    source = torch.tensor([ceiling, -ceiling, below, -below])
    table = Mask((1.0,), (1.0,), (0.0,), (KEEP_ALL,), KEY, ceilings=(ceiling,))
    assert carried_out(table, torch.zeros(4), [source]).tolist() == [0.0, 0.0, below, -below]


@pytest.mark.parametrize("threshold", [0.25, 1e-45, 3e-39, float(np.float32(0.1))])
def test_a_magnitude_equal_to_the_threshold_is_kept(threshold):
    below = float(np.nextafter(F(threshold), F(0)))
    source = torch.tensor([threshold, -threshold, below, -below, 1.0])
    table = Mask((1.0,), (1.0,), (threshold,), (KEEP_ALL,), KEY)
    out = carried_out(table, torch.zeros(5), [source])
    assert out.tolist() == [float(F(threshold)), -float(F(threshold)), 0.0, 0.0, 1.0]


def test_a_random_number_equal_to_the_keep_level_drops():
    words = textbook.random_words(KEY.seed, KEY.tensor, 1, 3)[0]
    table = Mask((1.0,), (1.0,), (0.0,), (int(words[1]),), KEY)
    out = carried_out(table, torch.zeros(3), [torch.ones(3)])
    assert out.tolist() == [float(word < words[1]) for word in words]


def test_an_exact_tie_elects_plus():
    base = torch.zeros(3)
    sources = [torch.tensor([0.5, -0.5, 0.0]), torch.tensor([-0.5, 0.5, 0.0])]
    table = Mask((1.0, 1.0), (1.0, 1.0), (0.0, 0.0), (KEEP_ALL,) * 2, KEY, True, True)
    assert carried_out(table, base, sources).tolist() == [0.5, 0.5, 0.0]


def test_division_counts_only_the_models_that_won_however_small_their_weight():
    """A huge task vector of small weight wins; the other weights must not blur the divisor."""
    sources = [torch.tensor([1e-3]), torch.tensor([-2e6])]
    weights = (1.0, 1e-6)
    table = Mask(weights, weights, (0.0, 0.0), (KEEP_ALL,) * 2, KEY, True, True)
    assert carried_out(table, torch.zeros(1), sources).item() == pytest.approx(-2e6, rel=1e-6)


def test_store_rounds_to_nearest_even_and_keeps_small_numbers():
    halves = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 3e-39, -0.0])
    out = carried_out(Span((1.0,)), None, [halves], torch.bfloat16)
    assert out.tolist() == [1.0, 1 + 2.0**-6, 1 + 2.0**-7, torch.tensor(3e-39).bfloat16(), 0.0]
    assert math.copysign(1, out[4].item()) == -1
    assert out[3] > 0


def test_ranges_cover_without_overlap():
    assert list(ranges(10, 4)) == [(0, 4), (4, 8), (8, 10)]
    assert list(ranges(0, 4)) == []
