"""The two merge kernels in plain torch: the definition, which other implementations equal bitwise.

float32 throughout; sources in recipe order; multiply and add apart, never fused; each coefficient
rounded once from float64; the result rounded once to the output's dtype, to nearest, ties to even,
or up or down at random (dither).
Elements do not depend on one another, so chunks only bound the memory: some ten temporaries of
`CHUNK` numbers, whatever the tensor's size. Letters: M models, P elements of one flat tensor.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn.functional import hardshrink

from evomerge.checksums import tensor_checksum
from evomerge.kernels.launch import KernelJob, Written
from evomerge.kernels.masks import DITHER, GROUP, KEEP_ALL, MaskKey, random_words
from evomerge.kernels.tables import KernelTable, Local, Mask, Span, TieCut, Whole

CHUNK = 2**15
"""Elements carried out at once; the temporaries stay in a core's cache."""


def carry_out_all(jobs: Sequence[KernelJob]) -> list[Written]:
    """Run kernels one after another; see `dispatch.carry_out_all`."""
    return [_carried_out(job) for job in jobs]


def _carried_out(job: KernelJob) -> Written:
    carry_out(job.table, job.base_P, job.source_MP, job.out_P, dither=job.dither, first=job.first)
    first_byte = job.first * job.out_P.itemsize
    return Written(tensor_checksum(job.out_P, first_byte=first_byte), is_finite(job.out_P))


def carry_out(
    table: KernelTable,
    base_P: torch.Tensor | None,
    source_MP: Sequence[torch.Tensor],
    out_P: torch.Tensor,
    chunk: int = CHUNK,
    dither: MaskKey | None = None,
    first: int = 0,
) -> None:
    """Run the kernel that a table is for.

    Args:
        table: What to do; see `tables.py`.
        base_P: The base's elements in their stored dtype; None where the table has no base.
        source_MP: M flat tensors of P elements each, in their stored dtypes. Not written to.
        out_P: Flat tensor of P elements, of any floating dtype. Every element is written.
        chunk: Elements at once; the result does not depend on it.
        dither: What the result is rounded at random for; None rounds to nearest.
        first: Index of the first of these elements in the whole tensor.
    """
    if isinstance(table, Whole):
        merged_P = _whole(table, base_P, source_MP)
        out_P.copy_(merged_P if dither is None else dithered(merged_P, dither, 0))
        return
    for start, stop in ranges(len(out_P), chunk):
        base = None if base_P is None else base_P[start:stop].float()
        sources = [source_P[start:stop] for source_P in source_MP]
        if isinstance(table, Span):
            merged_P = span(table, base, sources)
        elif isinstance(table, Local):
            merged_P = table.run(base, [source_P.float() for source_P in sources])
        else:
            assert base is not None, "a mask is over task vectors"
            merged_P = mask(table, base, sources, first + start)
        out_P[start:stop] = (
            merged_P if dither is None else dithered(merged_P, dither, first + start)
        )


def _whole(
    table: Whole, base_P: torch.Tensor | None, source_MP: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Run with one thread: sums and factorisations of libraries split work by threads."""
    base = None if base_P is None else base_P.float().reshape(table.shape)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sources = [source_P.float().reshape(table.shape) for source_P in source_MP]
        return table.run(base, sources).reshape(-1)
    finally:
        torch.set_num_threads(threads)


def span(
    table: Span, base_P: torch.Tensor | None, source_MP: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return a weighted sum of the sources, or of their task vectors, as a new float32 tensor.

    Args:
        table: The coefficients.
        base_P: The base as float32; None where the table has none.
        source_MP: M flat tensors of P elements each.
    """
    pairs = zip(table.coefficients, source_MP, strict=True)
    terms = (_term(table, coefficient, source_P, base_P) for coefficient, source_P in pairs)
    total_P = next(terms)
    for term_P in terms:
        total_P.add_(term_P)
    return total_P if base_P is None else total_P.add_(base_P * table.base)


def _term(
    table: Span, coefficient: float, source_P: torch.Tensor, base_P: torch.Tensor | None
) -> torch.Tensor:
    if table.deltas and base_P is not None:
        return delta(source_P, base_P).mul_(coefficient)
    return source_P.float() * coefficient


def mask(
    table: Mask, base_P: torch.Tensor, source_MP: Sequence[torch.Tensor], first: int
) -> torch.Tensor:
    """Return the base plus a sum of task vectors with elements dropped, as a new float32 tensor.

    Args:
        table: What is kept, and how it is summed.
        base_P: The base as float32.
        source_MP: M flat tensors of P elements each.
        first: Index of the first of these elements in the whole tensor.
    """
    kept_MP = kept_deltas(table, base_P, source_MP, first)
    merged_P = _elected(table, kept_MP) if table.elect else _summed(table, kept_MP)
    return merged_P.mul_(table.lam).add_(base_P)


def kept_deltas(
    table: Mask, base_P: torch.Tensor, source_MP: Sequence[torch.Tensor], first: int
) -> Iterator[torch.Tensor]:
    """Yield each source's task vector with the dropped elements at 0, as a new float32 tensor.

    Arguments as for `mask`.
    """
    words: tuple[torch.Tensor, ...] = ()
    for i, source_P in enumerate(source_MP):
        if i % GROUP == 0 and table.draws(i // GROUP):
            words = random_words(table.key, i // GROUP, first, len(base_P), base_P.device)
        kept_P = delta(source_P, base_P)
        if table.ceiling(i) < math.inf:
            kept_P.mul_(kept_P.abs() < table.ceiling(i))
        if table.thresholds[i] > 0:
            # keeps magnitudes above the next smaller number, that is from the threshold on
            below = np.nextafter(np.float32(table.thresholds[i]), np.float32(0.0))
            kept_P = hardshrink(kept_P, float(below))
        if table.keep_levels[i] < KEEP_ALL:
            level = table.level(i, first, len(base_P))
            kept_P.mul_(words[i % GROUP] < level if table.keep_levels[i] else 0.0)
        cut = table.tie_cut(i)
        if cut is not None:
            kept_P.mul_(_stays(cut, kept_P, first, words[i % GROUP] if words else None))
        yield kept_P


def _stays(
    cut: TieCut, kept_P: torch.Tensor, first: int, word_P: torch.Tensor | None
) -> torch.Tensor:
    """Tell which elements a cut through a threshold's ties leaves, among those not below it."""
    index_P = torch.arange(first, first + len(kept_P), device=kept_P.device)
    stays_P = index_P < cut.end
    if cut.level < KEEP_ALL:
        assert word_P is not None or cut.level == 0, "no random numbers were drawn"
        stays_P &= word_P < cut.level if cut.level and word_P is not None else stays_P.new_zeros(())
    return stays_P | (kept_P.abs() >= cut.above)


def _summed(table: Mask, kept_MP: Iterator[torch.Tensor]) -> torch.Tensor:
    terms = (kept_P.mul_(scale) for scale, kept_P in zip(table.scales, kept_MP, strict=True))
    total_P = next(terms)
    for term_P in terms:
        total_P.add_(term_P)
    return total_P


def _elected(table: Mask, kept_MP: Iterator[torch.Tensor]) -> torch.Tensor:
    """Elect and sum in one sweep (Yadav 2023, https://arxiv.org/abs/2306.01708, section 3)."""
    # choices are multiplications by 0 and 1, exact and on a CPU many times faster than selection
    plus_P = minus_P = plus_weight_P = minus_weight_P = torch.zeros(())
    for scale, weight, kept_P in zip(table.scales, table.weights, kept_MP, strict=True):
        term_P = kept_P.mul_(scale)
        plus_P = term_P.clamp_min(0.0).add_(plus_P)
        minus_P = term_P.clamp_max(0.0).add_(minus_P)
        if table.normalize:
            sign_P = term_P.sign_()
            plus_weight_P = sign_P.clamp_min(0.0).mul_(weight).add_(plus_weight_P)
            minus_weight_P = sign_P.clamp_max_(0.0).mul_(-weight).add_(minus_weight_P)
    plus_wins_P = plus_P + minus_P >= 0
    merged_P = _choose(plus_wins_P, plus_P, minus_P)
    if table.normalize:
        divisor_P = _choose(plus_wins_P, plus_weight_P, minus_weight_P)
        merged_P.div_(divisor_P.add_(divisor_P == 0))
    return merged_P


def _choose(first_P: torch.Tensor, a_P: torch.Tensor, b_P: torch.Tensor) -> torch.Tensor:
    """Return `a` where `first` is true and `b` elsewhere; overwrites both."""
    return a_P.mul_(first_P).add_(b_P.mul_(~first_P))


def dithered(merged_P: torch.Tensor, key: MaskKey, first: int) -> torch.Tensor:
    """Round float32 numbers to bfloat16 at random, up with the chance of how far they are on.

    What bfloat16 would lose of a small step is kept on average (Gupta 2015, "Deep learning with
    limited numerical precision", https://arxiv.org/abs/1502.02551, section 3). The 16 bits that go
    are carried over if they and 16 random bits add up to 2**16 or more.

    Args:
        merged_P: Float32.
        key: What random bits are drawn for.
        first: Index of the first of these elements in the whole tensor.

    Returns:
        Float32 numbers that bfloat16 holds exactly.
    """
    word_P, *_ = random_words(key, DITHER, first, len(merged_P), merged_P.device)
    bits_P = merged_P.view(torch.int32) + (word_P & 0xFFFF).int()
    return bits_P.bitwise_and_(-(2**16)).view(torch.float32)


def delta(source_P: torch.Tensor, base_P: torch.Tensor) -> torch.Tensor:
    """Return the task vector `source - base` as a new float32 tensor; `base_P` is float32."""
    return source_P.float() - base_P


def ranges(size: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of consecutive chunks that cover `size` elements."""
    for start in range(0, size, chunk):
        yield start, min(start + chunk, size)


def is_finite(tensor_P: torch.Tensor) -> bool:
    """Whether a flat tensor holds neither NaN nor Inf."""
    # a sum is finite only if all its terms are, and far cheaper; one that overflows proves nothing
    # below 2**15 numbers torch does not call its other threads, which cost more than they help here
    pieces = tensor_P.split(CHUNK - 1)
    total = sum((piece_P.sum() for piece_P in pieces), start=torch.zeros(()))
    return bool(total.isfinite()) or all(bool(piece_P.isfinite().all()) for piece_P in pieces)
