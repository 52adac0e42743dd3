"""The merge kernels in Triton, for CUDA; bitwise equal to `reference.py`. Needs triton.

One launch merges many tensors. A program does `BLOCK` elements of one tensor: `blocks` names the
tensor of each program, and the tensor's rows in `integers` and `numbers` (see `triton_pack.py`)
hold addresses, counts and coefficients. Every tensor starts at a multiple of 16 bytes, so 8
elements of 16 bits are one load; what is past a tensor's end may be read up to the next multiple of
8 elements, and is never written.

Multiply and add stay apart (`enable_fp_fusion=False`), sums go in recipe order, division rounds to
nearest. Prefixes: p_ address, b_ block of elements, i_ index. Letters: K candidates, M models.
"""

# triton's language knows neither starred tuples nor a constant on the left, and unrolls its loops
# ruff: noqa: RUF005, SIM108, SIM300
# mypy: disable-error-code="assignment, misc"

import torch
import triton
import triton.language as tl

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
"""Triton's names of the dtypes that kernels read and write."""

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether triton's interpreter runs the kernels; it cuts off what bfloat16 cannot hold, so that
rounding must be done on integers."""

# columns of `integers`; after them M source addresses, M rank addresses, and what each of K
# candidates has: the address of its output, and for masks bounds, steps, ends and bounds of cuts
COUNT = tl.constexpr(0)
FIRST_BLOCK = tl.constexpr(1)
FIRST = tl.constexpr(2)
NAME = tl.constexpr(3)
SEED = tl.constexpr(4)
DITHER_NAME = tl.constexpr(5)
DITHER_SEED = tl.constexpr(6)
BASE_ADDRESS = tl.constexpr(7)
COMMON = tl.constexpr(8)

ROUNDS = tl.constexpr(7)  # masks.ROUNDS
GROUP = tl.constexpr(4)  # masks.GROUP
DITHER_GROUP = tl.constexpr(0xFFFFFFFF)  # masks.DITHER
MULTIPLIER_0 = tl.constexpr(0xD2511F53)
MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
KEY_STEP_0 = tl.constexpr(0x9E3779B9)
KEY_STEP_1 = tl.constexpr(0xBB67AE85)
SCE_SMALL = tl.constexpr(1e-6)
NEARSWAP_SMALL = tl.constexpr(1e-6)

# of checksums.py, and what finds an exponent of ones in any element of a 64-bit word
WORD_STEP = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _place(blocks, integers, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's tensor, the tensor's row, the block's first element and its size."""
    i_b = tl.program_id(0)
    i_t = tl.load(blocks + i_b).to(tl.int64)
    row = integers + i_t * WIDTH
    start = (i_b - tl.load(row + FIRST_BLOCK)) * BLOCK
    size = tl.minimum(tl.load(row + COUNT) - start, BLOCK).to(tl.int32)
    return i_t, row, start, size


@triton.jit
def _elements(address, start, size, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Load a block as float32; what lies beyond its size is undefined."""
    i_p = tl.arange(0, BLOCK)
    p_x = tl.multiple_of(tl.load(address).to(tl.pointer_type(DTYPE)), 16)
    b_x = tl.load(p_x + start + i_p, mask=i_p < (size + 7) // 8 * 8)
    if DTYPE == tl.bfloat16:
        # the interpreter's own conversion makes the smallest numbers 0
        b_bits = b_x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        b_float = b_bits.to(tl.float32, bitcast=True)
    else:
        b_float = b_x.to(tl.float32)
    return b_float


@triton.jit
def _sources(row, start, size, M: tl.constexpr, SOURCE: tl.constexpr, BLOCK: tl.constexpr):
    """Return a tuple of M blocks; all loads come before their first use."""
    b_sources = ()
    for i in tl.static_range(M):
        b_source = _elements(row + COMMON + i, start, size, SOURCE, BLOCK)
        b_sources = b_sources + (b_source,)
    return b_sources


@triton.jit
def _random_words(b_like, row, start, group, COLUMN: tl.constexpr, BLOCK: tl.constexpr):
    """Return the four words of `masks.random_words` for a block.

    The upper half of the index is the same for all of the block; `can_pack` sees to that. `b_like`
    is any loaded block, float32: that the words seem to depend on it makes triton lay them out over
    the threads as it is. Else it moves them through shared memory.
    """
    b_zero = b_like.to(tl.uint32, bitcast=True) >> 16 >> 16
    at = tl.load(row + FIRST) + start
    b_0 = tl.arange(0, BLOCK).to(tl.uint32) + at.to(tl.uint32) + b_zero
    b_1 = (at >> 32).to(tl.uint32)
    b_2 = tl.load(row + COLUMN).to(tl.uint32)
    b_3 = group
    key = tl.load(row + COLUMN + 1).to(tl.uint32)
    for i in tl.static_range(ROUNDS):
        b_first = b_0.to(tl.uint64) * MULTIPLIER_0
        b_third = b_2.to(tl.uint64) * MULTIPLIER_1
        key_1 = tl.full((), i * KEY_STEP_1 & 0xFFFFFFFF, tl.uint32)
        b_0 = (b_third >> 32).to(tl.uint32) ^ b_1 ^ key
        b_2 = (b_first >> 32).to(tl.uint32) ^ b_3 ^ key_1
        b_1, b_3 = b_third.to(tl.uint32), b_first.to(tl.uint32)
        key = key + tl.full((), KEY_STEP_0, tl.uint32)
    return b_0, b_1, b_2, b_3


@triton.jit
def _dither_word(b_like, row, start, DITHER: tl.constexpr, BLOCK: tl.constexpr):
    b_word = 0
    if DITHER:
        group = tl.full((), DITHER_GROUP, tl.uint32)
        b_word, _, _, _ = _random_words(b_like, row, start, group, DITHER_NAME, BLOCK)
    return b_word


@triton.jit
def _store(
    b_merged,
    b_word,
    address,
    start,
    size,
    OUT: tl.constexpr,
    DITHER: tl.constexpr,
    BY_INTEGERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round once and write a block; `b_word` is read with DITHER."""
    if DITHER:
        b_bits = b_merged.to(tl.int32, bitcast=True) + (b_word & 0xFFFF).to(tl.int32)
        b_merged = (b_bits & -65536).to(tl.float32, bitcast=True)
    if BY_INTEGERS and OUT == tl.bfloat16:
        b_bits = b_merged.to(tl.uint32, bitcast=True)
        b_even = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
        b_bits = tl.where(b_merged == b_merged, b_even, 0x7FC0)
        b_out = b_bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        b_out = b_merged.to(OUT)
    i_p = tl.arange(0, BLOCK)
    p_out = tl.multiple_of(tl.load(address).to(tl.pointer_type(OUT)), 16) + start
    # a mask of any size would cut the store of 8 elements into 8
    if size == BLOCK:
        tl.store(p_out + i_p, b_out)
    else:
        tl.store(p_out + i_p, b_out, mask=i_p < size)


@triton.jit
def span_kernel(
    blocks,
    integers,
    numbers,
    M: tl.constexpr,
    K: tl.constexpr,
    SOURCE: tl.constexpr,
    BASE: tl.constexpr,
    OUT: tl.constexpr,
    DITHER: tl.constexpr,
    BY_INTEGERS: tl.constexpr,
    BLOCK: tl.constexpr,
    DELTAS: tl.constexpr,
):
    """Carry out a `Span` for K candidates. BASE is None where no base takes part.

    Numbers of a tensor and candidate: M coefficients, that of the base.
    """
    i_t, row, start, size = _place(blocks, integers, COMMON + 2 * M + K, BLOCK)
    b_sources = _sources(row, start, size, M, SOURCE, BLOCK)
    if BASE is not None:
        b_base = _elements(row + BASE_ADDRESS, start, size, BASE, BLOCK)
    b_word = _dither_word(b_sources[0], row, start, DITHER, BLOCK)
    for k in tl.static_range(K):
        coefficients = numbers + (i_t * K + k) * (M + 1)
        for i in tl.static_range(M):
            b_source = b_sources[i]
            if DELTAS:
                b_source = b_source - b_base
            b_term = b_source * tl.load(coefficients + i)
            if i == 0:
                b_total = b_term
            else:
                b_total = b_total + b_term
        if BASE is not None:
            b_total = b_total + b_base * tl.load(coefficients + M)
        address = row + COMMON + 2 * M + k
        _store(b_total, b_word, address, start, size, OUT, DITHER, BY_INTEGERS, BLOCK)


@triton.jit
def mask_kernel(
    blocks,
    integers,
    numbers,
    M: tl.constexpr,
    K: tl.constexpr,
    SOURCE: tl.constexpr,
    BASE: tl.constexpr,
    OUT: tl.constexpr,
    DITHER: tl.constexpr,
    BY_INTEGERS: tl.constexpr,
    BLOCK: tl.constexpr,
    ELECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CEILINGS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    DRAWS: tl.constexpr,
    RANKS: tl.constexpr,
    CUTS: tl.constexpr,
):
    """Carry out a `Mask` for K candidates.

    Integers of a candidate: the output's address; per model the largest random number that keeps,
    what a rank adds to it, the index from which ties are cut, the largest number that keeps a tie.
    Numbers of a tensor and candidate: scales, weights, largest magnitudes that are dropped,
    ceilings, magnitudes above the ties; lambda.
    """
    WIDTH: tl.constexpr = 1 + 4 * M
    i_t, row, start, size = _place(blocks, integers, COMMON + 2 * M + K * WIDTH, BLOCK)
    b_sources = _sources(row, start, size, M, SOURCE, BLOCK)
    b_base = _elements(row + BASE_ADDRESS, start, size, BASE, BLOCK)
    b_ranks = ()
    if RANKS:
        for i in tl.static_range(M):
            b_rank = _ranks(row + COMMON + M + i, start, size, BLOCK)
            b_ranks = b_ranks + (b_rank,)
    b_words = ()
    if DRAWS:
        for i in tl.static_range(0, M, GROUP):
            group = tl.full((), i // GROUP, tl.uint32)
            b_0, b_1, b_2, b_3 = _random_words(b_base, row, start, group, NAME, BLOCK)
            b_words = b_words + (b_0, b_1, b_2, b_3)
    b_dither = _dither_word(b_sources[0], row, start, DITHER, BLOCK)
    for k in tl.static_range(K):
        levels = row + COMMON + 2 * M + k * WIDTH
        values = numbers + (i_t * K + k) * (5 * M + 1)
        b_terms = ()
        for i in tl.static_range(M):
            b_kept = b_sources[i] - b_base
            if CEILINGS:
                b_below = tl.abs(b_kept) < tl.load(values + 3 * M + i)
                b_kept = tl.where(b_below, b_kept, b_kept * 0.0)
            if THRESHOLDS:
                b_kept = tl.where(tl.abs(b_kept) <= tl.load(values + 2 * M + i), 0.0, b_kept)
            scale = tl.load(values + i)
            if DRAWS:
                b_bound = tl.load(levels + 1 + i).to(tl.uint32)
                if RANKS:
                    b_bound = b_bound + b_ranks[i] * tl.load(levels + 1 + M + i).to(tl.uint32)
                b_stays = b_words[i] <= b_bound
            if CUTS:
                end = tl.load(levels + 1 + 2 * M + i) - tl.load(row + FIRST) - start
                b_tie = tl.arange(0, BLOCK) < tl.minimum(tl.maximum(end, 0), BLOCK).to(tl.int32)
                if DRAWS:
                    b_tie = b_tie & (b_words[i] <= tl.load(levels + 1 + 3 * M + i).to(tl.uint32))
                b_tie = b_tie | (tl.abs(b_kept) >= tl.load(values + 4 * M + i))
                if DRAWS:
                    b_stays = b_stays & b_tie
                else:
                    b_stays = b_tie
            if DRAWS or CUTS:
                # a zero with the sign that multiplying by 0 leaves
                b_term = b_kept * tl.where(b_stays, scale, scale * 0.0)
            else:
                b_term = b_kept * scale
            b_terms = b_terms + (b_term,)
        if ELECT:
            b_merged = _elected(b_terms, values + M, M, NORMALIZE)
        else:
            b_merged = b_terms[0]
            for i in tl.static_range(1, M):
                b_merged = b_merged + b_terms[i]
        b_merged = b_merged * tl.load(values + 5 * M) + b_base
        _store(b_merged, b_dither, levels, start, size, OUT, DITHER, BY_INTEGERS, BLOCK)


@triton.jit
def _elected(b_terms, weights, M: tl.constexpr, NORMALIZE: tl.constexpr):
    """As `reference._elected`, up to the sign of a sum of negative terms that is 0.

    That sum is taken only where it is below 0.
    """
    # adding 0 makes a negative zero positive
    b_plus = tl.maximum(b_terms[0], 0.0, propagate_nan=tl.PropagateNan.ALL) + 0.0
    b_minus = tl.minimum(b_terms[0], 0.0, propagate_nan=tl.PropagateNan.ALL)
    for i in tl.static_range(1, M):
        b_plus = b_plus + tl.maximum(b_terms[i], 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_minus = b_minus + tl.minimum(b_terms[i], 0.0, propagate_nan=tl.PropagateNan.ALL)
    b_up = b_plus + b_minus >= 0
    b_merged = tl.where(b_up, b_plus, b_minus)
    if NORMALIZE:
        b_sign = tl.where(b_up, 0, -(2**31))
        b_divisor = tl.zeros_like(b_merged)
        for i in tl.static_range(M):
            # above 0 where the term has the elected sign
            b_agrees = (b_terms[i].to(tl.int32, bitcast=True) ^ b_sign) > 0
            b_divisor = b_divisor + tl.where(b_agrees, tl.load(weights + i), 0.0)
        b_merged = tl.div_rn(b_merged, tl.where(b_divisor == 0, 1.0, b_divisor))
    return b_merged


@triton.jit
def _ranks(address, start, size, BLOCK: tl.constexpr):
    i_p = tl.arange(0, BLOCK)
    p_rank = tl.multiple_of(tl.load(address).to(tl.pointer_type(tl.uint8)), 8)
    b_rank = tl.load(p_rank + start + i_p, mask=i_p < (size + 7) // 8 * 8)
    return b_rank.to(tl.uint32)


@triton.jit
def local_kernel(
    blocks,
    integers,
    numbers,
    M: tl.constexpr,
    K: tl.constexpr,
    SOURCE: tl.constexpr,
    BASE: tl.constexpr,
    OUT: tl.constexpr,
    DITHER: tl.constexpr,
    BY_INTEGERS: tl.constexpr,
    BLOCK: tl.constexpr,
    METHOD: tl.constexpr,
):
    """Carry out a `Local` by its `Fused` form; K is 1.

    Numbers of a tensor: those of each model, kind after kind, then the others.
    """
    i_t, row, start, size = _place(blocks, integers, COMMON + 2 * M + K, BLOCK)
    PER_MODEL: tl.constexpr = 0 if METHOD == "nearswap" else 2 if METHOD == "consensus" else 1
    values = numbers + i_t * (PER_MODEL * M + 1)
    b_sources = _sources(row, start, size, M, SOURCE, BLOCK)
    b_base = _elements(row + BASE_ADDRESS, start, size, BASE, BLOCK)
    if METHOD == "sce":
        b_merged = _sce(b_base, b_sources, values, M)
    elif METHOD == "ram":
        b_merged = _ram(b_base, b_sources, values, M)
    elif METHOD == "consensus":
        b_merged = _consensus(b_base, b_sources, values, M)
    else:
        tl.static_assert(METHOD == "nearswap")
        b_merged = _nearswap(b_base, b_sources, values)
    b_word = _dither_word(b_sources[0], row, start, DITHER, BLOCK)
    address = row + COMMON + 2 * M
    _store(b_merged, b_word, address, start, size, OUT, DITHER, BY_INTEGERS, BLOCK)


@triton.jit
def _sce(b_base, b_sources, values, M: tl.constexpr):
    """As `methods.sce.elected`: M weights, threshold."""
    b_first = b_sources[0] - b_base
    b_mean = tl.zeros_like(b_base)
    for i in tl.static_range(M):
        b_mean = b_mean + ((b_sources[i] - b_base) - b_first)
    b_mean = b_mean * (1.0 / M)
    b_spread = tl.zeros_like(b_base)
    for i in tl.static_range(M):
        b_distance = ((b_sources[i] - b_base) - b_first) - b_mean
        b_spread = b_spread + b_distance * b_distance
    b_kept = tl.where(b_spread >= tl.load(values + M), 1.0, 0.0)
    b_total = tl.zeros_like(b_base)
    for i in tl.static_range(M):
        b_total = b_total + (b_sources[i] - b_base) * b_kept
    b_up = b_total >= 0
    b_merged, b_divisor = tl.zeros_like(b_base), tl.zeros_like(b_base)
    for i in tl.static_range(M):
        weight = tl.load(values + i)
        b_delta = (b_sources[i] - b_base) * b_kept
        b_agrees = tl.where(b_up, b_delta > 0, b_delta < 0)
        b_merged = b_merged + b_delta * tl.where(b_agrees, 1.0, 0.0) * weight
        b_divisor = b_divisor + tl.where(b_agrees, weight, 0.0)
    b_divisor = tl.where(b_divisor < SCE_SMALL, SCE_SMALL, b_divisor)
    return tl.div_rn(b_merged, b_divisor) + b_base


@triton.jit
def _ram(b_base, b_sources, values, M: tl.constexpr):
    """As `methods.ram.joined`: M factors, epsilon."""
    epsilon = tl.load(values + M)
    b_count = tl.zeros_like(b_base)
    b_total, b_alone = b_count, b_count
    for i in tl.static_range(M):
        b_delta = b_sources[i] - b_base
        b_active = tl.where(tl.abs(b_delta) > epsilon, 1.0, 0.0)
        b_delta = b_delta * b_active
        b_count = b_count + b_active
        b_total = b_total + b_delta
        b_alone = b_alone + b_delta * tl.load(values + i)
    b_mean = tl.div_rn(b_total, tl.where(b_count < 1.0, 1.0, b_count))
    return tl.where(b_count > 1.0, b_mean, b_alone) + b_base


@triton.jit
def _consensus(b_base, b_sources, values, M: tl.constexpr):
    """As `methods.consensus.agreed`: M weights, M factors, the least number of tasks."""
    b_total = tl.zeros_like(b_base)
    for i in tl.static_range(M):
        b_total = b_total + (b_sources[i] - b_base)
    b_needed = tl.zeros_like(b_base)
    b_merged = b_needed
    for i in tl.static_range(M):
        b_delta = b_sources[i] - b_base
        b_others = tl.abs(b_total - b_delta) * tl.load(values + M + i)
        b_needed = b_needed + tl.where(tl.abs(b_delta) >= b_others, 1.0, 0.0)
        b_merged = b_merged + b_delta * tl.load(values + i)
    return b_merged * tl.where(b_needed >= tl.load(values + 2 * M), 1.0, 0.0) + b_base


@triton.jit
def _nearswap(b_base, b_sources, values):
    """As `methods.nearswap.swapped`: t."""
    b_distance = tl.abs(b_base - b_sources[0])
    b_distance = tl.where(b_distance < NEARSWAP_SMALL, NEARSWAP_SMALL, b_distance)
    b_share = tl.div_rn(tl.zeros_like(b_base) + tl.load(values), b_distance)
    b_share = tl.where(b_share > 1.0, 1.0, b_share)
    return b_share * b_sources[0] + (1.0 - b_share) * b_base


@triton.jit(do_not_specialize=["T"])
def written_kernel(blocks, integers, totals, T, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up checksums of tensors, and count words that hold what is not finite.

    `integers` has, for each tensor: its address, bytes, first block, first word in the whole
    tensor, and for each element of a word the bits of its exponent and the lowest of these.
    `totals` is (SLOTS, 2, T), zeros at first; integers add up to the same in any order.
    """
    i_b = tl.program_id(0)
    i_t = tl.load(blocks + i_b).to(tl.int64)
    row = integers + i_t * 6
    start = (i_b - tl.load(row + 2)) * BLOCK
    size = tl.minimum(tl.load(row + 1) - start * 8, BLOCK * 8).to(tl.int32)  # bytes
    i_w = tl.arange(0, BLOCK)
    p_word = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.uint64)), 16) + start
    b_word = tl.load(p_word + i_w, mask=i_w < (size + 15) // 16 * 2)
    # a last word of fewer than 8 bytes is filled up with zeros
    ones = tl.full((), 0xFFFFFFFFFFFFFFFF, tl.uint64)
    last = ones >> ((8 - size % 8) % 8 * 8).to(tl.uint64)
    b_word = b_word & tl.where(i_w == (size - 1) // 8, last, ones)
    exponent = tl.load(row + 4).to(tl.uint64, bitcast=True)
    lowest = tl.load(row + 5).to(tl.uint64, bitcast=True)
    b_wrong = ((b_word & exponent) + lowest) & (exponent + lowest)
    first = (tl.load(row + 3) + start).to(tl.uint64)
    b_mixed = (b_word + (first + i_w.to(tl.uint64)) * WORD_STEP) * MIX_1
    b_mixed = (b_mixed ^ (b_mixed >> 32)) * MIX_2
    b_mixed = b_mixed ^ (b_mixed >> 29)
    b_counts = i_w * 8 < size
    checksum = tl.sum(tl.where(b_counts, b_mixed, 0))
    num_wrong = tl.sum((b_counts & (b_wrong != 0)).to(tl.int64))
    # slots, so that programs do not queue for one number
    slot = totals + (i_b % SLOTS).to(tl.int64) * 2 * T + i_t
    tl.atomic_add(slot, checksum.to(tl.int64, bitcast=True), sem="relaxed")
    tl.atomic_add(slot + T, num_wrong, sem="relaxed")
