"""Sink: merged tensors into a folder. `live.py` stores the same bits in a live model."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from typing_extensions import override

from evomerge.checkpoints.source import TensorSource
from evomerge.checkpoints.writer import GIB, CheckpointWriter
from evomerge.checksums import weights_digest
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.execute import Merged, execute
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
    """Write the merge as a checkpoint that appears whole or not at all.

    Tensors are merged one by one in the order of the files, so each file is finished before the
    next is begun.

    Args:
        plan: The merge.
        sources: The models' tensors, as given to `make_plan`.
        statistics: Facts about these models; see `execute`.
        to: Where the merge is written.
        write_beside: Called with the unfinished folder and the digest, to add everything that is
            not a tensor.

    Returns:
        The weights' digest; `write_live` gives the same for the same plan.

    Raises:
        CheckpointError: The folder cannot be written.
        MergeError, NonFiniteError: As `execute`; nothing is left behind.
    """
    specs = [job.spec for job in plan.jobs]
    metered = {model: MeteredSource(source) for model, source in sources.items()}
    with CheckpointWriter(to.folder, specs, to.shard_bytes, to.identity) as writer:
        num_done = sum(spec.name not in writer.missing for spec in specs)
        progress = Progress(num_done, len(specs), 0, 0, writer.resumed)
        to.notify(progress)
        merged = execute(plan, metered, statistics, only=frozenset(writer.missing))
        for num_bytes in _write_behind(writer, merged):
            progress = dataclasses.replace(
                progress,
                num_done=progress.num_done + 1,
                read_bytes=sum(source.read_bytes for source in metered.values()),
                written_bytes=progress.written_bytes + num_bytes,
            )
            to.notify(progress)
        digest = weights_digest(writer.checksums)
        writer.finish(lambda folder: write_beside(folder, digest))
    return digest


def _write_behind(writer: CheckpointWriter, tensors: Iterator[Merged]) -> Iterator[int]:
    """Write each tensor while the next is made, in a thread; yield its bytes once it is written."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        pending: Future[int] | None = None
        for merged in tensors:
            if pending:
                yield pending.result()
            pending = thread.submit(_write, writer, merged)
        if pending:
            yield pending.result()


def _write(writer: CheckpointWriter, merged: Merged) -> int:
    writer.write(merged.name, merged.tensor, merged.checksum)
    return merged.tensor.nbytes


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
