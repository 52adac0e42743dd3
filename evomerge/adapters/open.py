"""ModelRef -> the model's tensors, with its adapter applied if the reference names one."""

import hashlib
import json

from evomerge.adapters.source import AdapterSource
from evomerge.checkpoints.fingerprint import fingerprint
from evomerge.checkpoints.locate import locate, locate_adapter
from evomerge.checkpoints.reader import LazyCheckpoint, open_checkpoint
from evomerge.checksums import checksum_of
from evomerge.config.models import ModelRef

Model = LazyCheckpoint | AdapterSource
"""The tensors of one model; either way it has `folder`, `main_dtype` and `total_bytes` too."""


def open_model(ref: ModelRef, *, mapped: bool = True) -> Model:
    """Open a model, downloaded first where it is a hub id; reads headers, no tensors.

    Args:
        ref: The model; messages name it as it is written there.
        mapped: As for `open_checkpoint`.

    Raises:
        CheckpointError: The model or its adapter cannot be had, or the two do not go together.
    """
    folder = locate(ref)
    if ref.adapter is None:
        return open_checkpoint(folder, str(ref), mapped=mapped)
    base = open_checkpoint(folder, str(ref.without_adapter), mapped=mapped)
    return AdapterSource(base, str(ref), locate_adapter(ref.adapter))


def fingerprint_of(model: Model) -> str:
    """Return a quick identity of a model's tensors, as 64 hexadecimal digits.

    That of the folder (`checkpoints.fingerprint`) where there is no adapter; with one, a hash of
    that and of every bit and scale of the adapter, so that a retrained adapter shows.

    Raises:
        CheckpointError: As `open_model`.
    """
    base = fingerprint(model.folder)
    if not isinstance(model, AdapterSource):
        return base
    factors = [
        [name, part.scale, part.transposed, checksum_of(part.a_RI), checksum_of(part.b_OR)]
        for name, part in sorted(model.adapter.low_rank.items())
    ]
    saved = [[name, checksum_of(tensor)] for name, tensor in sorted(model.adapter.saved.items())]
    return hashlib.sha256(json.dumps([base, factors, saved]).encode()).hexdigest()
