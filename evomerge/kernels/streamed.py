"""Streamed: sources that wait in host memory and pass through a device's memory piece by piece.

For models that do not fit on a GPU beside the live one. The next pieces are copied while kernels
work on those before, so that a candidate costs what moving its sources over the bus costs.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from evomerge.kernels.launch import KernelJob, Written
from evomerge.kernels.tables import KernelTable, Mask, Whole

SCRATCH_BYTES = 2**28
"""Size of each of the two buffers that pieces are copied to; what a table needs whole (`Whole`) may
make them larger."""

ALIGNMENT = 4096
"""Elements that tensors are cut at multiples of, and bytes that each piece begins at a multiple
of."""

Launch = Callable[[Sequence[KernelJob]], list[Written]]
IsFar = Callable[[torch.Tensor, torch.device], bool]
Step = list[tuple[int, KernelJob]]
"""Jobs of one launch, each with the index of the job that it is a run of."""


def on_host(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor is in host memory and the device has other memory."""
    return tensor.device.type == "cpu" and device.type != "cpu"


def can_run(job: KernelJob) -> bool:
    """Whether a job writes to a device, and something that it reads is in host memory."""
    if job.out_P.is_cpu:
        return False
    return any(on_host(tensor, job.out_P.device) for tensor in (*_models(job), *_ranks(job.table)))


def carry_out_all(
    jobs: Sequence[KernelJob],
    launch: Launch,
    scratch_bytes: int = SCRATCH_BYTES,
    is_far: IsFar = on_host,
) -> list[Written]:
    """Carry out jobs piece by piece, with the bits and checksums of one launch.

    What several jobs read, as those of several recipes do, is copied once. Copies overlap with
    kernels where the sources are in pinned memory. Ranks are copied for a whole tensor at once.

    Args:
        jobs: In any order.
        launch: Carries out jobs on memory of one device, which is done with them when it returns.
        scratch_bytes: Memory for the pieces that are worked on together; twice that is taken.
        is_far: Which tensors are copied to the device of the output.

    Returns:
        What was written, in the jobs' order.
    """
    total = [Written(0, True)] * len(jobs)
    for device in dict.fromkeys(job.out_P.device for job in jobs):
        steps = _steps(jobs, device, is_far, scratch_bytes)
        copier = _Copier(jobs, steps, device, is_far)
        coming = copier.copied(steps[0])
        for after in (*steps[1:], []):
            step = coming
            copier.wait()
            # queued before the kernels, so that it is copied while they work
            coming = copier.copied(after)
            for (place, _), written in zip(step, launch([job for _, job in step]), strict=True):
                total[place] = _added(total[place], written)
    return total


def _added(one: Written, other: Written) -> Written:
    checksum = (one.checksum + other.checksum) % 2**64
    return Written(checksum, one.is_finite and other.is_finite)


class _Piece(NamedTuple):
    """A run of elements.

    Attributes:
        places: Indices of the jobs that read it, which read the same elements of the same models.
        start, stop: Its elements among the jobs'.
        num_bytes: Memory for what of it is copied.
    """

    places: tuple[int, ...]
    start: int
    stop: int
    num_bytes: int


def _steps(
    jobs: Sequence[KernelJob], device: torch.device, is_far: IsFar, scratch_bytes: int
) -> list[list[_Piece]]:
    """Gather pieces that are worked on together, in at most `scratch_bytes` where possible."""
    steps: list[list[_Piece]] = []
    room = 0
    for places in _groups(jobs, device):
        for piece in _pieces(jobs, places, device, is_far, scratch_bytes):
            if not steps or piece.num_bytes > room:
                steps.append([])
                room = scratch_bytes
            steps[-1].append(piece)
            room -= piece.num_bytes
    return steps


def _groups(jobs: Sequence[KernelJob], device: torch.device) -> list[tuple[int, ...]]:
    """Return the indices of jobs on a device, those together that read the same elements."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, job in enumerate(jobs):
        if job.out_P.device == device:
            read = [(tensor.data_ptr(), tensor.dtype) for tensor in _models(job)]
            whole = isinstance(job.table, Whole)
            key = (whole, job.base_P is None, job.first, len(job.out_P), *read)
            groups.setdefault(key, []).append(i)
    return [tuple(places) for places in groups.values()]


def _pieces(
    jobs: Sequence[KernelJob],
    places: tuple[int, ...],
    device: torch.device,
    is_far: IsFar,
    scratch_bytes: int,
) -> Iterator[_Piece]:
    job = jobs[places[0]]
    size = len(job.out_P)
    far = [tensor.itemsize for tensor in _models(job) if is_far(tensor, device)]
    most = max(size, 1)
    if far and not isinstance(job.table, Whole):
        most = max(1, scratch_bytes // sum(far) // ALIGNMENT) * ALIGNMENT
    for start in range(0, max(size, 1), most):
        stop = min(start + most, size)
        yield _Piece(places, start, stop, sum(_room((stop - start) * each) for each in far))


def _room(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class _Copier:
    """Copies pieces of jobs to one device: into two buffers that take turns, on a side stream."""

    def __init__(
        self,
        jobs: Sequence[KernelJob],
        steps: Sequence[Sequence[_Piece]],
        device: torch.device,
        is_far: IsFar,
    ) -> None:
        self._jobs, self._device, self._is_far = jobs, device, is_far
        most = max(sum(piece.num_bytes for piece in step) for step in steps)
        self._buffers = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(2)]
        self._near_ranks: dict[int, torch.Tensor] = {}
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copied(self, step: Sequence[_Piece]) -> Step:
        """Queue the copies for one step; return its jobs, on what is going to be there."""
        if self._side is not None:
            # kernels may still read from the buffer that is written to
            self._side.wait_stream(torch.cuda.current_stream(self._device))
        self._buffers.reverse()
        used = 0
        launched: Step = []
        ranks: dict[int, torch.Tensor] = {}
        with torch.cuda.stream(self._side):
            for piece in step:
                models = self._models_near(piece, used)
                used += piece.num_bytes
                for place in piece.places:
                    job = self._jobs[place]
                    self._bring_ranks(job.table, ranks)
                    launched.append((place, _run_of(job, piece, models, ranks)))
        self._near_ranks = ranks
        return launched

    def wait(self) -> None:
        """Let the device begin on what was queued when that is there."""
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)

    def _models_near(self, piece: _Piece, used: int) -> list[torch.Tensor]:
        near = []
        for tensor in _models(self._jobs[piece.places[0]]):
            run_P = tensor[piece.start : piece.stop]
            if self._is_far(tensor, self._device):
                room_P = self._buffers[0][used : used + run_P.nbytes].view(run_P.dtype)
                used += _room(run_P.nbytes)
                run_P = room_P.copy_(run_P, non_blocking=True)
            near.append(run_P)
        return near

    def _bring_ranks(self, table: KernelTable, ranks: dict[int, torch.Tensor]) -> None:
        """Add a table's ranks by their old place; those of the step before are there already."""
        for rank_P in _ranks(table):
            place = rank_P.data_ptr()
            near_P = ranks.get(place, self._near_ranks.get(place))
            if near_P is None and self._is_far(rank_P, self._device):
                near_P = torch.empty_like(rank_P, device=self._device)
                near_P.copy_(rank_P, non_blocking=True)
            ranks[place] = rank_P if near_P is None else near_P


def _run_of(
    job: KernelJob,
    piece: _Piece,
    models: Sequence[torch.Tensor],
    ranks: Mapping[int, torch.Tensor],
) -> KernelJob:
    table: KernelTable = job.table
    if isinstance(table, Mask) and ranks:
        near = (rank_P if rank_P is None else ranks[rank_P.data_ptr()] for rank_P in table.ranks)
        table = dataclasses.replace(table, ranks=tuple(near))
    return dataclasses.replace(
        job,
        table=table,
        base_P=None if job.base_P is None else models[0],
        source_MP=models[len(models) - len(job.source_MP) :],
        out_P=job.out_P[piece.start : piece.stop],
        first=job.first + piece.start,
    )


def _models(job: KernelJob) -> list[torch.Tensor]:
    """Return the elements that a job reads, the base's first."""
    return [*([] if job.base_P is None else [job.base_P]), *job.source_MP]


def _ranks(table: KernelTable) -> list[torch.Tensor]:
    held = table.ranks if isinstance(table, Mask) else ()
    return [rank_P for rank_P in held if rank_P is not None]
