"""Sink: merged tensors into a folder. `live.py` stores the same bits in a live model."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from evomerge.checkpoints.fingerprint import Checksum, checksum_of, weights_digest
from evomerge.checkpoints.source import TensorSource
from evomerge.checkpoints.writer import GIB, write_checkpoint
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.execute import execute
from evomerge.merging.plan import MergePlan


def write_folder(
    plan: MergePlan,
    sources: Mapping[str, TensorSource],
    statistics: StatisticsCache,
    out: Path,
    write_beside: Callable[[Path, str], None],
    shard_bytes: int = 5 * GIB,
) -> str:
    """Write the merge as a checkpoint that appears whole or not at all.

    Args:
        plan: The merge.
        sources: The models' tensors, as given to `make_plan`.
        statistics: Facts about these models; see `execute`.
        out: The new folder; must not exist, or be empty.
        write_beside: Called with the unfinished folder and the digest, to add everything that is
            not a tensor.
        shard_bytes: Most bytes of tensors in one file.

    Returns:
        The weights' digest; `write_live` gives the same for the same plan.

    Raises:
        CheckpointError: The folder cannot be written.
        MergeError, NonFiniteError: As `execute`; nothing is left behind.
    """
    checksums: dict[str, Checksum] = {}
    write_checkpoint(
        out,
        _noting(execute(plan, sources, statistics), checksums),
        [job.spec for job in plan.jobs],
        lambda folder: write_beside(folder, weights_digest(checksums)),
        shard_bytes,
    )
    return weights_digest(checksums)


def _noting(
    tensors: Iterator[tuple[str, torch.Tensor]], checksums: dict[str, Checksum]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        checksums[name] = checksum_of(tensor)
        yield name, tensor
