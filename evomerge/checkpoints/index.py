"""Which file holds which tensor, from index files and headers, without reading any tensor.

The format: 8 bytes little-endian length, a JSON header, then the tensors one after another without
holes (https://huggingface.co/docs/safetensors/index#format).
"""

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import CheckpointError

STORED_DTYPES: dict[str, torch.dtype] = {
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes that are read and written, by their name in a header, in the order safetensors writes."""

MAX_HEADER_BYTES = 100_000_000
"""Largest header of the format; a longer one means that the file is something else."""

# in the order in which transformers looks for them
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class CheckpointFiles:
    """The files that hold a checkpoint's tensors.

    Attributes:
        paths: The files, sorted by name, all present.
        listed: Tensor name to file name, as the index file says; empty where there is no index
            file.
        pickled: Whether these are PyTorch pickles rather than safetensors.
    """

    paths: tuple[Path, ...]
    listed: Mapping[str, str]
    pickled: bool


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes `start` to `start + num_bytes` of the file at `path`."""

    path: Path
    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def refuse_dtype(label: str, file: str, name: str, dtype: str) -> CheckpointError:
    """Return the error for a tensor of a dtype that cannot be merged."""
    return CheckpointError(
        f"{label}: {name} in {file} is {dtype}; evomerge merges F32, F16 and BF16, and copies "
        "integers and booleans. Convert the model to one of these first."
    )


def read_json(path: Path, label: str) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        CheckpointError: The file cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{label}: {path.name} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{label}: {path.name} is not JSON ({error}). Download it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{label}: {path.name} is not a JSON object. Download it again.")
    return value


def find_files(folder: Path, label: str) -> CheckpointFiles:
    """Find the files that hold a checkpoint's tensors: safetensors first, a single file first.

    Args:
        folder: The checkpoint's folder.
        label: How messages name the checkpoint.

    Raises:
        CheckpointError: There are no weights, or the index file is malformed or names a shard that
            is missing.
    """
    found = next((folder / name for name in _WEIGHT_FILES if (folder / name).exists()), None)
    if found is None:
        held = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
        raise CheckpointError(
            f"{label}: holds no model.safetensors or pytorch_model.bin, nor an index of shards "
            f"(it has {held}). Give the folder of a complete model."
        )
    pickled = ".bin" in found.name
    if found.suffix != ".json":
        return CheckpointFiles((found,), {}, pickled)
    listed = _read_weight_map(found, label)
    files = sorted(set(listed.values()))
    for file in files:
        if not (folder / file).exists():
            raise CheckpointError(
                f"{label}: {found.name} names {file}, which is not there. Download it again."
            )
    return CheckpointFiles(tuple(folder / file for file in files), listed, pickled)


def _read_weight_map(path: Path, label: str) -> dict[str, str]:
    listed = read_json(path, label).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{label}: {path.name} has no weight_map. Download it again.")
    for name, file in listed.items():
        # a path that leaves the folder would let an index read any file of this machine
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{label}: {path.name} puts {name} into {file!r}, which is not a file of this "
                "folder. Download it again."
            )
    return listed


def check_shards(files: CheckpointFiles, held: Mapping[str, Collection[str]], label: str) -> None:
    """Check that the shards hold every tensor once, and what the index says.

    Args:
        files: The checkpoint's files.
        held: File name to the names of the tensors it holds.
        label: How messages name the checkpoint.

    Raises:
        CheckpointError: A tensor is in two shards, or not in the shard that the index names.
    """
    for name, file in files.listed.items():
        if name not in held[file]:
            raise CheckpointError(
                f"{label}: the index puts {name} into {file}, which does not hold it. "
                "Download both again."
            )
    file_of: dict[str, str] = {}
    for file, names in held.items():
        for name in names:
            if file_of.setdefault(name, file) != file:
                raise CheckpointError(
                    f"{label}: {name} is both in {file_of[name]} and in {file}. "
                    "Remove the shards that are left over from another save."
                )


def index_tensors(files: CheckpointFiles, label: str) -> dict[str, TensorEntry]:
    """Return where each tensor of a safetensors checkpoint lies.

    Raises:
        CheckpointError: A shard is unreadable, truncated, malformed, of a dtype that cannot be
            merged, or does not agree with the index or another shard.
    """
    headers = {path.name: read_header(path, label) for path in files.paths}
    check_shards(files, headers, label)
    return {name: entry for entries in headers.values() for name, entry in entries.items()}


def read_header(path: Path, label: str) -> dict[str, TensorEntry]:
    """Read a safetensors file's header and check it against the file's size.

    Raises:
        CheckpointError: The file is unreadable, truncated, too long, malformed, or holds a dtype
            that cannot be merged.
    """
    text, size = _header_text(path, label)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _malformed(label, path, "has a header that is not JSON") from error
    if not isinstance(header, dict):
        raise _malformed(label, path, "has a header that is not a JSON object")
    header.pop("__metadata__", None)
    data_start = 8 + len(text)
    entries = {
        name: _entry(path, name, fields, data_start, label) for name, fields in header.items()
    }
    _check_ranges(path, entries, data_start, size, label)
    return entries


def _header_text(path: Path, label: str) -> tuple[bytes, int]:
    """Return a safetensors file's header, and the size of the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            text = file.read(min(int.from_bytes(prefix, "little"), MAX_HEADER_BYTES + 1))
    except OSError as error:
        raise CheckpointError(f"{label}: {path.name} cannot be read ({error.strerror}).") from error
    if prefix == b"version ":
        raise CheckpointError(
            f"{label}: {path.name} is a Git LFS pointer, not the weights. "
            "Run git lfs pull in its folder."
        )
    length = int.from_bytes(prefix, "little") if len(prefix) == 8 else 0
    if length > MAX_HEADER_BYTES:
        raise _malformed(label, path, "does not begin with a safetensors header")
    if size < 8 + length:
        raise _short(label, path, 8 + length - size)
    return text, size


def _entry(path: Path, name: str, fields: Any, data_start: int, label: str) -> TensorEntry:
    try:
        code, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(label, path, f"has a malformed header entry for {name}") from error
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)):
        raise _malformed(label, path, f"has a malformed header entry for {name}")
    if not isinstance(code, str) or code not in STORED_DTYPES:
        raise refuse_dtype(label, path.name, name, str(code))
    dtype = STORED_DTYPES[code]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _malformed(
            label, path, f"gives {name} {end - begin} bytes, but {code} of shape {shape}"
        )
    return TensorEntry(path, data_start + begin, end - begin, dtype, shape)


def _check_ranges(
    path: Path, entries: Mapping[str, TensorEntry], data_start: int, size: int, label: str
) -> None:
    reached, last = data_start, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if entry.start < reached:
            raise _malformed(label, path, f"has {last} and {name} overlap")
        if entry.start > reached:
            raise _malformed(label, path, f"has a hole before {name}")
        reached, last = entry.start + entry.num_bytes, name
    if size < reached:
        raise _short(label, path, reached - size)
    if size > reached:
        raise _malformed(label, path, f"has {size - reached} bytes more than its header says")


def _short(label: str, path: Path, num_bytes: int) -> CheckpointError:
    return CheckpointError(
        f"{label}: {path.name} is {num_bytes} bytes short of its header. Download it again."
    )


def _malformed(label: str, path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{label}: {path.name} {what}. Download it again.")
