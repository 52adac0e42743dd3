"""Packing for the Triton kernels: which jobs they can do, which go together, and their tables.

Needs no triton. Letters: K candidates, M models, T tensors.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evomerge.kernels.launch import KernelJob
from evomerge.kernels.masks import KEEP_ALL, MaskKey
from evomerge.kernels.tables import Fused, Local, Mask, Span

MAX_MODELS = 8
"""Most sources of a job; what the kernels were compiled and looked at for."""

BLOCK = 1024
"""Elements of one program: eight for each of 128 threads, one 16-byte load of 16-bit numbers."""

LARGE_BLOCK = 2048
"""The same for masks of few models, which instructions hold up: a tenth fewer for each element."""

FEW_MODELS = 4
"""Most models for which the registers of a large block suffice."""

FUSED = ("sce", "ram", "consensus", "nearswap")
"""Names of the expressions that the kernels have."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_VECTOR = 8
_NO_KEY = MaskKey(0, "")
_KEEPS_ALL = KEEP_ALL - 1
_NO_END = 2**63 - 1

Batch = Sequence[KernelJob]
"""Jobs that differ in table and output alone: one read of the sources does them all."""


@dataclass(frozen=True)
class Variant:
    """What a launch's kernel is compiled for.

    Attributes:
        kernel: `span`, `mask` or `local`.
        models: Number of sources.
        candidates: Jobs of a batch.
        source: Dtype of all sources.
        base: Dtype of the base; None where none takes part.
        out: Dtype of the outputs.
        dither: Whether the results are rounded at random.
        features: What takes part; see the kernels' own parameters. A job that has none of a feature
            is packed with numbers that change nothing.
        method: Name of the expression of a `local`.
    """

    kernel: str
    models: int
    candidates: int
    source: torch.dtype
    base: torch.dtype | None
    out: torch.dtype
    dither: bool = False
    features: frozenset[str] = frozenset()
    method: str = ""

    @property
    def block(self) -> int:
        """Elements of one program."""
        small = self.kernel != "mask" or self.candidates > 1 or self.models > FEW_MODELS
        return BLOCK if small or self.features & {"RANKS", "CUTS"} else LARGE_BLOCK


def can_pack(job: KernelJob) -> bool:
    """Whether the kernels can do a job, wherever its tensors lie, all on one device."""
    tensors = [*_inputs(job), job.out_P]
    return (
        1 <= len(job.source_MP) <= MAX_MODELS
        and _has_kernel(job)
        and len({source.dtype for source in job.source_MP}) == 1
        and len({tensor.device for tensor in tensors}) == 1
        and len({tensor.numel() for tensor in tensors}) == 1
        and all(_is_even(tensor) for tensor in tensors)
        and not _index_carries(job)
    )


def _index_carries(job: KernelJob) -> bool:
    """Whether an index may pass a multiple of 2**32 inside a block, unseen by the kernels."""
    last = job.first + max(0, len(job.out_P) - 1)
    return job.first % LARGE_BLOCK != 0 and job.first >> 32 != last >> 32


def _inputs(job: KernelJob) -> list[torch.Tensor]:
    return [*job.source_MP] if job.base_P is None else [*job.source_MP, job.base_P]


def _is_even(tensor_P: torch.Tensor) -> bool:
    """Whether a tensor has a known dtype and can be read eight elements at a time."""
    start_fits = tensor_P.data_ptr() % (_VECTOR * tensor_P.itemsize) == 0
    return tensor_P.dtype in _DTYPES and tensor_P.is_contiguous() and start_fits


def _has_kernel(job: KernelJob) -> bool:
    table, num_models = job.table, len(job.source_MP)
    if isinstance(table, Span):
        return len(table.coefficients) == num_models
    if job.base_P is None:
        return False
    if isinstance(table, Mask):
        fits = [_ranks_fit(table, i, job) for i in range(len(table.scales))]
        return len(fits) == num_models and all(fits)
    return isinstance(table, Local) and table.fused is not None and table.fused.name in FUSED


def _ranks_fit(table: Mask, model: int, job: KernelJob) -> bool:
    """Whether the level of every rank stays within 32 bits, and ranks can be read."""
    step, level = _step(table, model), table.keep_levels[model]
    if step == 0:
        return True
    rank_P = table.ranks[model]
    return (
        rank_P is not None
        and rank_P.dtype == torch.uint8
        and rank_P.numel() >= job.first + len(job.out_P)
        and rank_P.device == job.out_P.device
        and rank_P.is_contiguous()
        and rank_P.data_ptr() % _VECTOR == 0
        and step > 0
        and level + 255 * step <= KEEP_ALL
    )


def _step(table: Mask, model: int) -> int:
    """Return what a rank adds to a model's keep level; 0 where the level is not a chance."""
    level = table.keep_levels[model]
    return table.rank_steps[model] if table.rank_steps and 0 < level < KEEP_ALL else 0


def batches(jobs: Sequence[KernelJob]) -> Iterator[list[int]]:
    """Yield the places of jobs that one read of their sources does: 8, 4, 2 or 1 at a time."""
    alike = defaultdict(list)
    for place, job in enumerate(jobs):
        alike[_sharing(job, place)].append(place)
    for places in alike.values():
        while places:
            size = next(size for size in (8, 4, 2, 1) if size <= len(places))
            yield places[:size]
            places = places[size:]


def _sharing(job: KernelJob, place: int) -> tuple[object, ...]:
    """Return what jobs of one batch have in common; the place where a job shares nothing."""
    table = job.table
    inputs = tuple(tensor.data_ptr() for tensor in _inputs(job))
    same = (type(table), inputs, len(job.out_P), job.first, job.dither, job.out_P.dtype)
    if isinstance(table, Span):
        return (*same, table.deltas)
    # others are held up by instructions, or run out of registers
    if isinstance(table, Mask) and not table.elect and len(job.source_MP) <= FEW_MODELS:
        steps = [_step(table, i) for i in range(len(table.scales))]
        ranks = tuple(_rank_address(job, i) if step else 0 for i, step in enumerate(steps))
        return (*same, table.key, ranks)
    return (place,)


def variant_of(batch: Batch) -> Variant:
    """Return what a batch needs a kernel to be compiled for."""
    job = batch[0]
    kernel, method = "span", ""
    if isinstance(job.table, Mask):
        kernel = "mask"
    elif isinstance(job.table, Local):
        kernel, method = "local", _fused(job).name
    return Variant(
        kernel=kernel,
        models=len(job.source_MP),
        candidates=len(batch),
        source=job.source_MP[0].dtype,
        base=None if job.base_P is None else job.base_P.dtype,
        out=job.out_P.dtype,
        dither=job.dither is not None,
        features=_fixed_features(job),
        method=method,
    )


def _fixed_features(job: KernelJob) -> frozenset[str]:
    """Return the features that all jobs of a launch have or have not."""
    table = job.table
    has = {
        "DELTAS": isinstance(table, Span) and table.deltas and job.base_P is not None,
        "ELECT": isinstance(table, Mask) and table.elect,
        "NORMALIZE": isinstance(table, Mask) and table.elect and table.normalize,
    }
    return frozenset(name for name, present in has.items() if present)


def mask_features(table: Mask) -> frozenset[str]:
    """Return the features of a mask that any job of its launch may have."""
    models = range(len(table.scales))
    cuts = [cut for cut in table.tie_cuts if cut is not None]
    levels = [*table.keep_levels, *(cut.level for cut in cuts)]
    has = {
        "CEILINGS": any(table.ceiling(i) < math.inf for i in models),
        "THRESHOLDS": any(threshold > 0 for threshold in table.thresholds),
        "DRAWS": any(0 < level < KEEP_ALL for level in levels),
        "RANKS": any(_step(table, i) for i in models),
        "CUTS": bool(cuts),
    }
    return frozenset(name for name, present in has.items() if present)


def _fused(job: KernelJob) -> Fused:
    assert isinstance(job.table, Local), "only expressions have a fused form"
    assert job.table.fused is not None, "can_pack refuses expressions without one"
    return job.table.fused


def blocks_of(sizes: Sequence[int], block: int) -> tuple[int, ...]:
    """Return how many blocks hold each of some numbers of elements."""
    return tuple(-(-size // block) for size in sizes)


def first_blocks(blocks: Sequence[int]) -> list[int]:
    """Return each tensor's first block."""
    return np.cumsum([0, *blocks])[:-1].tolist()


def pack(batches_T: Sequence[Batch], blocks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the two tables of a launch; columns as in `triton_kernels.py`.

    Args:
        batches_T: Of one variant.
        blocks: How many blocks each takes.

    Returns:
        Integers, int64, and numbers, float32, each with a row per batch.
    """
    pairs = zip(batches_T, first_blocks(blocks), strict=True)
    integers = [_integers(batch, first) for batch, first in pairs]
    numbers = [[x for job in batch for x in _numbers(job)] for batch in batches_T]
    return np.array(integers, dtype=np.int64), np.array(numbers, dtype=np.float32)


def _integers(batch: Batch, first_block: int) -> list[int]:
    job = batch[0]
    table = job.table
    key = table.key if isinstance(table, Mask) else _NO_KEY
    dither = job.dither or _NO_KEY
    base = 0 if job.base_P is None else job.base_P.data_ptr()
    row = [len(job.out_P), first_block, job.first, _name_word(key), key.seed]
    row += [_name_word(dither), dither.seed, base]
    row += [source_P.data_ptr() for source_P in job.source_MP]
    row += [_rank_address(job, i) for i in range(len(job.source_MP))]
    for each in batch:
        row.append(each.out_P.data_ptr())
        if isinstance(each.table, Mask):
            row += _mask_integers(each.table)
    return row


def _name_word(key: MaskKey) -> int:
    """Return the word that stands for a tensor's name; see `masks.random_words`."""
    return int.from_bytes(hashlib.sha256(key.tensor.encode()).digest()[:4], "little")


def _rank_address(job: KernelJob, model: int) -> int:
    if isinstance(job.table, Mask) and _step(job.table, model):
        rank_P = job.table.ranks[model]
        assert rank_P is not None, "can_pack refuses steps without ranks"
        return rank_P.data_ptr() + job.first
    # read with a step of 0 where only other models, or other jobs of the launch, have ranks
    return job.source_MP[model].data_ptr()


def _mask_integers(table: Mask) -> list[int]:
    models = range(len(table.scales))
    cuts = [table.tie_cut(i) for i in models]
    drawn = [0 < level < KEEP_ALL for level in table.keep_levels]
    bounds = [
        level - 1 if draws else _KEEPS_ALL
        for level, draws in zip(table.keep_levels, drawn, strict=True)
    ]
    steps = [_step(table, i) for i in models]
    ends = [_NO_END if cut is None else cut.end if cut.level else 0 for cut in cuts]
    tie_bounds = [max(cut.level - 1, 0) if cut else _KEEPS_ALL for cut in cuts]
    return [*bounds, *steps, *ends, *tie_bounds]


def _numbers(job: KernelJob) -> tuple[float, ...]:
    table = job.table
    if isinstance(table, Span):
        return (*table.coefficients, table.base)
    if isinstance(table, Mask):
        return _mask_numbers(table)
    fused = _fused(job)
    return (*(number for numbers in fused.per_model for number in numbers), *fused.shared)


def _mask_numbers(table: Mask) -> tuple[float, ...]:
    models = range(len(table.scales))
    pairs = zip(table.scales, table.keep_levels, strict=True)
    # a level of 0 leaves zeros with the sign that multiplying by 0 leaves
    scales = [scale if level else math.copysign(0.0, scale) for scale, level in pairs]
    below = [_largest_below(threshold) for threshold in table.thresholds]
    ceilings = [table.ceiling(i) for i in models]
    cuts = [table.tie_cut(i) for i in models]
    aboves = [cut.above if cut else math.inf for cut in cuts]
    return (*scales, *table.weights, *below, *ceilings, *aboves, table.lam)


def _largest_below(threshold: float) -> float:
    """Return the largest float32 magnitude that a threshold drops; -1 where it drops none."""
    if threshold <= 0:
        return -1.0
    return float(np.nextafter(np.float32(threshold), np.float32(0.0)))
