"""LazyCheckpoint: tensors over memory maps; opening reads headers, reading touches pages.

StreamedCheckpoint: the same tensors, each read into memory of its own; nothing stays behind.
"""

import mmap
import os
import pickle
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from evomerge.checkpoints.architecture import embedding_and_head, is_leftover
from evomerge.checkpoints.index import (
    STORED_DTYPES,
    CheckpointFiles,
    TensorEntry,
    check_shards,
    find_files,
    index_tensors,
    read_json,
    refuse_dtype,
)
from evomerge.checkpoints.source import MemorySource
from evomerge.checksums import as_bytes
from evomerge.errors import CheckpointError


class LazyCheckpoint(MemorySource):
    """The tensors of a checkpoint's files, mapped read-only: only pages that are used are read.

    A write to a tensor it gives out ends the process. Forked processes share the maps; a pickled
    one opens the files again where it arrives. Made by `open_checkpoint`.
    """

    def __init__(
        self,
        folder: Path,
        label: str,
        tensors: Mapping[str, torch.Tensor],
        tied: Mapping[str, str],
    ) -> None:
        super().__init__(tensors, label, tied)
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return open_checkpoint, (self.folder, self.label)

    @override
    def read(self, name: str) -> torch.Tensor:
        return self._find(name).contiguous()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def main_dtype(self) -> torch.dtype:
        """The floating dtype that most elements have.

        Raises:
            CheckpointError: No tensor is of a floating dtype.
        """
        count: Counter[torch.dtype] = Counter()
        for tensor in self._tensors.values():
            if tensor.is_floating_point():
                count[tensor.dtype] += tensor.numel()
        if not count:
            raise CheckpointError(
                f"{self.label}: holds no floating-point tensor, so there is nothing to merge."
            )
        return max(count, key=lambda dtype: (count[dtype], str(dtype)))


class StreamedCheckpoint(LazyCheckpoint):
    """The tensors of safetensors files, each read into new memory whenever it is asked for.

    For one pass over a model that may be larger than memory: pages of a map count as the process's
    own for as long as the map lives, what was read here is gone when its reader lets go of it.
    Files are open only while they are read. Made by `open_checkpoint`.

    Args:
        folder: The checkpoint's folder.
        label: How messages name the model.
        entries: Where each tensor lies.
        tied: As `TensorSource.tied`.
    """

    holds_tensors = False

    def __init__(
        self,
        folder: Path,
        label: str,
        entries: Mapping[str, TensorEntry],
        tied: Mapping[str, str],
    ) -> None:
        shapes = {
            name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            for name, entry in entries.items()
        }
        super().__init__(folder, label, shapes, tied)
        self._entries = dict(entries)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(open_checkpoint, mapped=False), (self.folder, self.label)

    @override
    def read(self, name: str) -> torch.Tensor:
        self._find(name)
        return read_entry(self._entries[name], self.label)


def read_entry(entry: TensorEntry, label: str) -> torch.Tensor:
    """Read one tensor of a safetensors file into new memory.

    Args:
        entry: Where it lies.
        label: How messages name the model.

    Raises:
        CheckpointError: The file cannot be read, or has become shorter.
    """
    data = torch.empty(entry.num_bytes, dtype=torch.uint8)
    rest, start = data.numpy().data, entry.start
    try:
        with entry.path.open("rb", buffering=0) as file:
            while rest:  # one call gives at most 2 GiB
                count = os.preadv(file.fileno(), [rest], start)
                if not count:
                    raise CheckpointError(
                        f"{label}: {entry.path.name} has become {len(rest)} bytes shorter while "
                        "it was read. Download it again."
                    )
                rest, start = rest[count:], start + count
    except OSError as error:
        raise CheckpointError(
            f"{label}: {entry.path.name} cannot be read ({error.strerror})."
        ) from error
    return data.view(entry.dtype).reshape(entry.shape)


def open_checkpoint(
    folder: Path, label: str | None = None, *, read_ahead: bool = True, mapped: bool = True
) -> LazyCheckpoint:
    """Open a model's tensors without reading them.

    The output head counts as tied, and is not listed, where transformers 5 would load the token
    embedding in its place: `tie_word_embeddings` is true in config.json and the head is absent or
    equal to the embedding bit by bit; or the head shares the embedding's memory in a pickle and the
    config does not deny it. A head that is stored and differs is listed even where the config says
    tied, because transformers then leaves it untied. A folder without config.json has no tied
    names. Constants that older versions stored with the weights (`architecture.is_leftover`) are
    not listed either.

    Args:
        folder: Folder with safetensors or PyTorch weights (`index.find_files`).
        label: How messages name the model; None is the folder.
        read_ahead: Whether the kernel reads on beyond what is asked for; False where little of each
            tensor is going to be looked at. Has no effect on pickles.
        mapped: Whether tensors alias memory maps, which every process of the machine shares, or are
            read into new memory (`StreamedCheckpoint`). Pickles are mapped either way: where a
            tensor lies in them is known to torch alone.

    Raises:
        CheckpointError: The files are missing, unreadable, truncated, inconsistent, of a dtype that
            cannot be merged, or a pickle that holds more than tensors.
    """
    where = f"{label} ({folder})" if label and label != str(folder) else str(folder)
    files = find_files(folder, where)
    entries = {} if files.pickled else index_tensors(files, where)
    if files.pickled:
        tensors = _load_pickles(files, where)
    else:
        tensors = _map_files(files, entries, where, read_ahead)
    tied = _tied_names(tensors, folder, where)
    leftover = [name for name, tensor in tensors.items() if is_leftover(name, tuple(tensor.shape))]
    unlisted = {*tied, *leftover}
    if entries and not mapped:
        streamed = {name: entry for name, entry in entries.items() if name not in unlisted}
        return StreamedCheckpoint(folder, label or str(folder), streamed, tied)
    kept = {name: tensor for name, tensor in tensors.items() if name not in unlisted}
    return LazyCheckpoint(folder, label or str(folder), kept, tied)


def _map_files(
    files: CheckpointFiles, entries: Mapping[str, TensorEntry], label: str, read_ahead: bool
) -> dict[str, torch.Tensor]:
    maps = {path: _map_file(path, label, read_ahead) for path in files.paths}
    with warnings.catch_warnings():
        # torch says once that the memory is read-only, which is the point
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return {name: _tensor_at(maps[entry.path], entry) for name, entry in entries.items()}


def _map_file(path: Path, label: str, read_ahead: bool) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(
            f"{label}: {path.name} cannot be mapped ({error.strerror})."
        ) from error
    mapped.madvise(mmap.MADV_NORMAL if read_ahead else mmap.MADV_RANDOM)
    return mapped


def _tensor_at(mapped: mmap.mmap, entry: TensorEntry) -> torch.Tensor:
    if not entry.num_bytes:  # frombuffer refuses a count of 0
        return torch.zeros(entry.shape, dtype=entry.dtype)
    count = entry.num_bytes // entry.dtype.itemsize
    flat = torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=entry.start)
    return flat.reshape(entry.shape)


def _load_pickles(files: CheckpointFiles, label: str) -> dict[str, torch.Tensor]:
    shards = {path.name: _load_pickle(path, label) for path in files.paths}
    check_shards(files, shards, label)
    return {name: tensor for shard in shards.values() for name, tensor in shard.items()}


def _load_pickle(path: Path, label: str) -> dict[str, torch.Tensor]:
    damaged = CheckpointError(
        f"{label}: {path.name} is truncated, or not in PyTorch's format since version 1.6. "
        "Download it again, or convert the model to safetensors."
    )
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise damaged
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{label}: {path.name} is a pickle that holds more than tensors, and loading it would "
            "run its code. Convert the model to safetensors on a machine where you trust it."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{label}: {path.name} cannot be read ({error.strerror}).") from error
    except (RuntimeError, ValueError, EOFError) as error:
        raise damaged from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{label}: {path.name} holds {type(loaded).__name__}, not named tensors."
        )
    for name, tensor in loaded.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{label}: {name} in {path.name} is {type(tensor).__name__}, not a tensor."
            )
        if tensor.dtype not in STORED_DTYPES.values():
            raise refuse_dtype(label, path.name, name, str(tensor.dtype))
    return loaded


def _tied_names(tensors: Mapping[str, torch.Tensor], folder: Path, label: str) -> dict[str, str]:
    embedding, head = embedding_and_head(tensors)
    says_tied = _config_ties(folder, label)
    if embedding is None or says_tied is False:
        return {}
    if head is None:
        return {"lm_head.weight": embedding} if says_tied else {}
    shared = tensors[head].data_ptr() == tensors[embedding].data_ptr()
    if shared or (says_tied and _same_bits(tensors[head], tensors[embedding])):
        return {head: embedding}
    return {}


def _config_ties(folder: Path, label: str) -> bool | None:
    path = folder / "config.json"
    config = read_json(path, label) if path.exists() else {}
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return None


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(as_bytes(one), as_bytes(other))
