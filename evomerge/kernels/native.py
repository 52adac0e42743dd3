"""Native: the kernels in C, compiled on this machine; packs the jobs of a launch for `native.c`."""

import ctypes
import functools
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch

from evomerge.kernels import compiler
from evomerge.kernels.launch import KernelJob, Written
from evomerge.kernels.masks import MaskKey
from evomerge.kernels.tables import KernelTable, Local, Mask, Span, TieCut

_SOURCES = (Path(__file__).with_name("native.c"), Path(__file__).with_name("strips.h"))

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS = {
    name: kind
    for kind, name in enumerate(
        ("span", "span of deltas", "mask", "sce", "ram", "consensus", "nearswap")
    )
}
_BATCH, _JOB = 6, 9
"""Fields of a `Batch` and of a `Job`."""

_NEVER = -1
"""A threshold that is none, the seed of what is not drawn for."""

_NO_CUT = TieCut(0.0, level=_NEVER)

_ELEMENTS_PER_THREAD = 2**18
"""A thread takes longer to start than to merge much fewer."""


def missing() -> str | None:
    """Tell why this machine cannot compile the kernels; None where it can."""
    return compiler.missing(*_SOURCES)


def can_run(job: KernelJob) -> bool:
    """Whether there is a kernel for a job's table and dtypes, and its tensors are on the CPU."""
    size = job.out_P.numel()
    tensors = [job.out_P, *job.source_MP]
    if job.base_P is not None:
        tensors.append(job.base_P)
    return _is_supported(job, size) and all(_is_reachable(each_P, size) for each_P in tensors)


def _is_reachable(tensor_P: torch.Tensor, size: int) -> bool:
    return (
        tensor_P.is_cpu
        and tensor_P.dtype in _DTYPES
        and tensor_P.is_contiguous()
        and tensor_P.numel() == size
    )


def _is_supported(job: KernelJob, size: int) -> bool:
    table, num_models = job.table, len(job.source_MP)
    if isinstance(table, Span):
        return len(table.coefficients) == num_models > 0
    if job.base_P is None or not num_models:
        return False
    if isinstance(table, Mask):
        ranks = [rank_P for rank_P in table.ranks if rank_P is not None]
        end = job.first + size
        return len(table.scales) == num_models and all(_is_rank(rank_P, end) for rank_P in ranks)
    return isinstance(table, Local) and table.fused is not None and table.fused.name in _KINDS


def _is_rank(rank_P: torch.Tensor, end: int) -> bool:
    return (
        rank_P.is_cpu
        and rank_P.dtype is torch.uint8
        and rank_P.is_contiguous()
        and rank_P.numel() >= end
    )


def carry_out_all(jobs: Sequence[KernelJob]) -> list[Written]:
    """Run kernels, by as many threads as torch has; see `dispatch.carry_out_all`.

    Jobs on the same sources read them together. What is written does not depend on the threads.

    Raises:
        MemoryError: If there is not even memory for a few strips of each source.
    """
    library = compiler.load(*_SOURCES)
    assert library is not None, missing()
    batches: dict[tuple[int, ...], list[int]] = {}
    for place, job in enumerate(jobs):
        batches.setdefault(_tensors(job), []).append(place)
    launch, order = _Launch(), []
    for tensors, places in batches.items():
        launch.add(tensors, [jobs[place] for place in places])
        order += places
    written = dict(zip(order, launch.run(library), strict=True))
    return [written[place] for place in range(len(jobs))]


def _tensors(job: KernelJob) -> tuple[int, ...]:
    """Return where a job's elements are: the first's index, their number, pointers and dtypes."""
    base_P = job.base_P
    flat = [job.first, job.out_P.numel()]
    flat += (0, 0) if base_P is None else (base_P.data_ptr(), _DTYPES[base_P.dtype])
    for source_P in job.source_MP:
        flat += (source_P.data_ptr(), _DTYPES[source_P.dtype])
    return tuple(flat)


@dataclass
class _Launch:
    """What `native.c` reads: its structs' fields one after another, each of 64 bits."""

    tensors: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    jobs: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    integers: list[int] = field(default_factory=list)
    most_models: int = 0
    elements: int = 0

    def add(self, key: tuple[int, ...], jobs: Sequence[KernelJob]) -> None:
        """Add jobs on the same tensors, as `_tensors` tells them."""
        first, size, *tensors = key
        num_models = len(tensors) // 2 - 1
        places = len(self.tensors) // 2, len(self.jobs) // _JOB
        self.batches += (first, size, num_models, *places, len(jobs))
        self.tensors += tensors
        for job in jobs:
            self._add_job(job)
        self.most_models = max(self.most_models, num_models)
        self.elements += size * len(jobs)

    def _add_job(self, job: KernelJob) -> None:
        numbers, integers = len(self.numbers), len(self.integers)
        kind = self._add_table(job.table, job.base_P is not None)
        out = job.out_P.data_ptr(), _DTYPES[job.out_P.dtype]
        dither = (_NEVER, 0) if job.dither is None else _key(job.dither)
        self.jobs += (kind, numbers, integers, *out, *dither, 0, 0)

    def _add_table(self, table: KernelTable, has_base: bool) -> int:
        """Add a table's numbers; return its kind, the place of its kernel in `KERNELS`."""
        if isinstance(table, Span):
            self.numbers += (table.base, *table.coefficients)
            return _KINDS["span of deltas" if table.deltas and has_base else "span"]
        if isinstance(table, Mask):
            self._add_mask(table)
            return _KINDS["mask"]
        assert isinstance(table, Local)
        assert table.fused is not None
        self.numbers += (*table.fused.shared, *chain(*table.fused.per_model))
        return _KINDS[table.fused.name]

    def _add_mask(self, table: Mask) -> None:
        """Add numbers and integers in the order in which `mask_of` takes them."""
        has = bool(table.ceilings), bool(table.rank_steps), bool(table.tie_cuts)
        self.numbers.append(table.lam)
        self.numbers += table.scales
        self.numbers += table.weights
        self.numbers += [number if number > 0 else _NEVER for number in table.thresholds]
        self.integers += (*_key(table.key), table.elect, table.normalize, *has)
        self.integers += table.keep_levels
        self.numbers += table.ceilings
        if table.rank_steps:
            self.integers += table.rank_steps
            self.integers += [0 if rank is None else rank.data_ptr() for rank in table.ranks]
        if table.tie_cuts:
            cuts = [cut or _NO_CUT for cut in table.tie_cuts]
            self.numbers += [cut.above for cut in cuts]
            self.integers += [cut.end for cut in cuts]
            self.integers += [cut.level for cut in cuts]

    def run(self, library: ctypes.CDLL) -> list[Written]:
        """Carry out all jobs; return what was written in the order in which they were added."""
        jobs, numbers = array("q", self.jobs), array("f", self.numbers)
        tensors, batches, integers = (
            array("q", each) for each in (self.tensors, self.batches, self.integers)
        )
        launch = array("q", [each.buffer_info()[0] for each in (tensors, batches, jobs)])
        launch.extend([each.buffer_info()[0] for each in (numbers, integers)])
        launch.extend((len(batches) // _BATCH, self.most_models, 0))
        threads = min(torch.get_num_threads(), 1 + self.elements // _ELEMENTS_PER_THREAD)
        if library.carry_out(ctypes.c_void_p(launch.buffer_info()[0]), threads):
            raise MemoryError
        sums, flags = jobs[_JOB - 2 :: _JOB], jobs[_JOB - 1 :: _JOB]
        return [Written(sum_ % 2**64, not flag) for sum_, flag in zip(sums, flags, strict=True)]


def _key(key: MaskKey) -> tuple[int, int]:
    return key.seed, _name_word(key.tensor)


@functools.lru_cache(maxsize=2**14)
def _name_word(tensor: str) -> int:
    """Return the third word of a tensor's counters; see `masks.random_words`."""
    return int.from_bytes(hashlib.sha256(tensor.encode()).digest()[:4], "little")
