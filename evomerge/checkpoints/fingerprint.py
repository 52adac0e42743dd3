"""Content hashes: a quick one for a study, a full one for export, a digest for candidates.

All are over names in canonical order, dtypes, shapes and bits, so that shards and file formats do
not matter.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from evomerge.checkpoints.reader import open_checkpoint
from evomerge.checkpoints.source import TensorSource
from evomerge.checksums import as_bytes, checksum_of, dtype_name, weights_digest

SAMPLES = 4
SAMPLE_BYTES = 4096
"""`fingerprint` looks at this many stretches of this many bytes of each tensor, evenly spread from
first to last byte."""


def fingerprint(folder: Path) -> str:
    """Return a quick identity of a checkpoint's tensors, as 64 hexadecimal digits.

    Covers every name, dtype and shape, and samples of every tensor's bits, so two fine-tunes of one
    base differ unless they differ in a few elements only; `full_hash` sees every bit. Sidecars are
    not covered.

    Raises:
        CheckpointError: As `open_checkpoint`.
    """
    digest = hashlib.sha256()
    for header, data in _records(folder, read_ahead=False):
        digest.update(header)
        for start in _sample_starts(data.numel()):
            digest.update(data[start : start + SAMPLE_BYTES].numpy().data)
    return digest.hexdigest()


def full_hash(folder: Path) -> str:
    """Return the SHA-256 over all of a checkpoint's tensors, as 64 hexadecimal digits.

    Raises:
        CheckpointError: As `open_checkpoint`.
    """
    digest = hashlib.sha256()
    for header, data in _records(folder, read_ahead=True):
        digest.update(header)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def _records(folder: Path, read_ahead: bool) -> Iterator[tuple[bytes, torch.Tensor]]:
    source = open_checkpoint(folder, read_ahead=read_ahead)
    for name in source.names():
        tensor = source.read(name)
        header = json.dumps([name, dtype_name(tensor.dtype), list(tensor.shape)])
        yield header.encode(), as_bytes(tensor)


def _sample_starts(num_bytes: int) -> list[int]:
    if num_bytes <= SAMPLES * SAMPLE_BYTES:
        return list(range(0, num_bytes, SAMPLE_BYTES))
    return [(num_bytes - SAMPLE_BYTES) * i // (SAMPLES - 1) for i in range(SAMPLES)]


def digest_of(source: TensorSource) -> str:
    """Return the digest of a source's tensors; equal for equal tensors, wherever they are."""
    return weights_digest({name: checksum_of(source.read(name)) for name in source.names()})
