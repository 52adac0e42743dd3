"""Sink: merged tensors into a folder. `live.py` stores the same bits in a live model."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from typing_extensions import override

from evomerge.checkpoints.source import TensorSource
from evomerge.checkpoints.writer import GIB, CheckpointWriter
from evomerge.checksums import weights_digest
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.execute import ONE_BY_ONE, Merged, Merger
from evomerge.merging.plan import MergePlan


@dataclass(frozen=True)
class Progress:
    """How far a merge into a folder has come.

    Attributes:
        num_done: Tensors that are written, those that an earlier process wrote included.
        num_tensors: Tensors of the merge.
        read_bytes: Bytes of the models' tensors that were read.
        written_bytes: Bytes of tensors that this process wrote.
        resumed: File names of the shards that an earlier process had finished.
    """

    num_done: int
    num_tensors: int
    read_bytes: int
    written_bytes: int
    resumed: tuple[str, ...]


def quietly(progress: Progress) -> None:
    """Tell nobody; the default of `Destination.notify`."""


@dataclass(frozen=True)
class Destination:
    """Where a merge is written.

    Attributes:
        folder: The new folder; must not exist, or be empty.
        shard_bytes: Most bytes of tensors in one file.
        identity: What the merge's bits depend on (`provenance.identity_of`), so that a merge of the
            same identity goes on where this one was killed; None starts anew.
        notify: Called at the start and whenever a tensor is written.
    """

    folder: Path
    shard_bytes: int = 5 * GIB
    identity: str | None = None
    notify: Callable[[Progress], None] = quietly


def write_folder(
    plan: MergePlan,
    sources: Mapping[str, TensorSource],
    statistics: StatisticsCache,
    to: Destination,
    write_beside: Callable[[Path, str], None],
) -> str:
    """Write one merge as a checkpoint, and return its digest; see `write_folders`."""
    (digest,) = write_folders([plan], sources, statistics, [to], [write_beside])
    return digest


def write_folders(
    plans: Sequence[MergePlan],
    sources: Mapping[str, TensorSource],
    statistics: StatisticsCache,
    to: Sequence[Destination],
    write_beside: Sequence[Callable[[Path, str], None]],
) -> list[str]:
    """Write K merges of the same models, read once, as checkpoints; each appears whole or not.

    Tensors are merged one by one in the order of the files, so each file is finished before the
    next is begun.

    Args:
        plans: The merges, with the same tensors in all of them.
        sources: The models' tensors, as given to `make_plan`.
        statistics: Facts about these models; see `execute`.
        to: Where each merge is written.
        write_beside: Called with each unfinished folder and its digest, to add everything that is
            not a tensor.

    Returns:
        The digests of the weights; `write_live` gives the same for the same plan.

    Raises:
        CheckpointError: A folder cannot be written.
        MergeError, NonFiniteError: As `Merger.execute_together`; nothing is left behind.
    """
    metered = {model: MeteredSource(source) for model, source in sources.items()}
    with ExitStack() as stack:
        folders = [
            _Folder(stack.enter_context(_writer(plan, each)), each, metered)
            for plan, each in zip(plans, to, strict=True)
        ]
        missing = frozenset(name for folder in folders for name in folder.writer.missing)
        outputs = [ONE_BY_ONE] * len(plans)
        merged = Merger(metered, statistics).execute_together(plans, missing, outputs)
        _write_behind(folders, merged)
        return [folder.finish(beside) for folder, beside in zip(folders, write_beside, strict=True)]


def _writer(plan: MergePlan, to: Destination) -> CheckpointWriter:
    specs = [job.spec for job in plan.jobs]
    return CheckpointWriter(to.folder, specs, to.shard_bytes, to.identity)


class _Folder:
    """A checkpoint that is being written, and how far it has come."""

    def __init__(
        self, writer: CheckpointWriter, to: Destination, metered: "Mapping[str, MeteredSource]"
    ) -> None:
        self.writer = writer
        self._notify, self._metered = to.notify, metered
        num_done = writer.num_tensors - len(writer.missing)
        self._progress = Progress(num_done, writer.num_tensors, 0, 0, writer.resumed)
        to.notify(self._progress)

    def write(self, merged: Merged) -> int:
        """Write a tensor unless an earlier process has; return its bytes."""
        if merged.name not in self.writer.missing:
            return 0
        self.writer.write(merged.name, merged.tensor, merged.checksum)
        return merged.tensor.nbytes

    def note(self, num_bytes: int) -> None:
        """Tell that a tensor is written."""
        if num_bytes:
            self._progress = dataclasses.replace(
                self._progress,
                num_done=self._progress.num_done + 1,
                read_bytes=sum(source.read_bytes for source in self._metered.values()),
                written_bytes=self._progress.written_bytes + num_bytes,
            )
            self._notify(self._progress)

    def finish(self, write_beside: Callable[[Path, str], None]) -> str:
        """Let the checkpoint appear; return its digest."""
        digest = weights_digest(self.writer.checksums)
        self.writer.finish(lambda folder: write_beside(folder, digest))
        return digest


def _write_behind(folders: Sequence[_Folder], groups: Iterator[tuple[Merged, ...]]) -> None:
    """Write each tensor of the merges while the next is made, in a thread."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        pending: Future[list[int]] | None = None
        for group in groups:
            _note(folders, pending)
            pending = thread.submit(_write, folders, group)
        _note(folders, pending)


def _note(folders: Sequence[_Folder], pending: Future[list[int]] | None) -> None:
    if pending is not None:
        for folder, num_bytes in zip(folders, pending.result(), strict=True):
            folder.note(num_bytes)


def _write(folders: Sequence[_Folder], group: Sequence[Merged]) -> list[int]:
    return [folder.write(merged) for folder, merged in zip(folders, group, strict=True)]


class MeteredSource(TensorSource):
    """Another source, and how many bytes of it were read.

    Args:
        source: The other source.

    Attributes:
        read_bytes: Bytes of the tensors that were given out.
    """

    def __init__(self, source: TensorSource) -> None:
        self.label = source.label
        self.read_bytes = 0
        self._source = source

    @property
    @override
    def tied(self) -> Mapping[str, str]:
        return self._source.tied

    @override
    def names(self) -> tuple[str, ...]:
        return self._source.names()

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    @override
    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    @override
    def merged_dtype(self, name: str) -> torch.dtype:
        return self._source.merged_dtype(name)

    @override
    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        self.read_bytes += tensor.nbytes
        return tensor
