"""Write a checkpoint: shards planned ahead, streamed, that appear whole or not at all."""

import errno
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from evomerge.checkpoints.index import STORED_DTYPES
from evomerge.checkpoints.source import as_bytes
from evomerge.errors import CheckpointError

GIB = 2**30
_CODE_OF = {dtype: code for code, dtype in STORED_DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes it takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file of the plan.

    Attributes:
        file: Name of the file.
        header: What stands before the data, its length included; a multiple of 8 bytes.
        offsets: Tensor name to the byte of the file where the tensor begins.
        num_bytes: Size of the whole file.
    """

    file: str
    header: bytes
    offsets: Mapping[str, int]
    num_bytes: int


def plan_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[Shard]:
    """Decide which file holds which tensor, and where.

    The plan depends on the set of specs only, not on their order. Tensors are dealt to shards by
    name; within a file they lie as safetensors' own writer puts them, wide dtypes first and then by
    name, so that each is aligned.

    Args:
        specs: What will be written; each name once.
        shard_bytes: Most bytes of tensors in a file; a larger tensor has a file of its own.
    """
    groups: list[list[TensorSpec]] = [[]]
    room = shard_bytes
    for spec in sorted(specs, key=lambda spec: spec.name):
        if groups[-1] and spec.num_bytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(spec)
        room -= spec.num_bytes
    if len(groups) == 1:
        return [_shard("model.safetensors", groups[0])]
    return [
        _shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group)
        for i, group in enumerate(groups, 1)
    ]


def _shard(file: str, specs: Sequence[TensorSpec]) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    rank = list(STORED_DTYPES.values()).index
    for spec in sorted(specs, key=lambda spec: (rank(spec.dtype), spec.name)):
        starts[spec.name], end = end, end + spec.num_bytes
        entries[spec.name] = {
            "dtype": _CODE_OF[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [starts[spec.name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + start for name, start in starts.items()}
    return Shard(file, header, offsets, len(header) + end)


def write_checkpoint(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    specs: Sequence[TensorSpec],
    write_sidecars: Callable[[Path], None],
    shard_bytes: int = 5 * GIB,
) -> None:
    """Write tensors and sidecars as a checkpoint that appears whole or not at all.

    Everything goes into a hidden folder beside the target, is synced, and is renamed at the end;
    whatever goes wrong, that folder is removed. One tensor is held at a time. The same tensors give
    the same bytes.

    Args:
        folder: Where the checkpoint is to be; must not exist, or be empty.
        tensors: Each spec's tensor once, in any order, on any device.
        specs: What will arrive; each name once, dtypes of `index.STORED_DTYPES`.
        write_sidecars: Called with the hidden folder once all tensors are written.
        shard_bytes: Most bytes of tensors in a file.

    Raises:
        CheckpointError: The target is not empty, the disk is full or not writable, or the tensors
            are not those of the specs.
    """
    plan = plan_shards(specs, shard_bytes)
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_target(folder, sum(shard.num_bytes for shard in plan))
        _remove_leftovers(folder)
        partial = _partial_path(folder, os.getpid())
        partial.mkdir()
    try:
        _write_shards(partial, folder, plan, tensors, {spec.name: spec for spec in specs})
        with _disk_errors(folder):
            if len(plan) > 1:
                _write_index(partial, plan, sum(spec.num_bytes for spec in specs))
            write_sidecars(partial)
            _sync(*partial.rglob("*"), partial)
            partial.rename(folder)
            _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "Free some space or choose another folder.",
            errno.EDQUOT: "Free some of your quota or choose another folder.",
            errno.ENOTEMPTY: "Another process wrote there; choose another folder.",
        }.get(error.errno or 0, "Choose a folder that can be written to.")
        raise CheckpointError(
            f"{folder}: cannot be written ({error.strerror or error}); nothing was kept. {advice}"
        ) from error


def _check_target(folder: Path, num_bytes: int) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(
            f"{folder}: exists and is not an empty folder. Choose another, or remove it."
        )
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes:
        raise CheckpointError(
            f"{folder}: needs {num_bytes / GIB:.2f} GiB, {free / GIB:.2f} GiB free. "
            "Free some space or choose another folder."
        )


def _partial_path(folder: Path, pid: int | str) -> Path:
    # the host is named because a pid says nothing to another machine that shares the disk
    return folder.parent / f".{folder.name}.partial-{socket.gethostname()}-{pid}"


def _remove_leftovers(folder: Path) -> None:
    # our own pid too: in a container a restarted process often gets the same one
    stem = _partial_path(folder, "").name
    for path in folder.parent.iterdir():
        start, pid = path.name[: len(stem)], path.name[len(stem) :]
        if start != stem or not pid.isdecimal():
            continue
        if int(pid) == os.getpid() or not _is_alive(int(pid)):
            shutil.rmtree(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_shards(
    partial: Path,
    folder: Path,
    plan: Sequence[Shard],
    tensors: Iterable[tuple[str, torch.Tensor]],
    missing: dict[str, TensorSpec],
) -> None:
    with ExitStack() as stack:
        place: dict[str, tuple[int, int]] = {}
        for shard in plan:
            with _disk_errors(folder):
                file = stack.enter_context((partial / shard.file).open("wb", buffering=0))
                _write_at(file.fileno(), shard.header, 0)
                # a file of empty tensors only ends with its header
                os.ftruncate(file.fileno(), shard.num_bytes)
            place |= {name: (file.fileno(), start) for name, start in shard.offsets.items()}
        for name, tensor in tensors:
            _check_arrival(folder, name, tensor, missing.pop(name, None))
            with _disk_errors(folder):
                _write_at(place[name][0], as_bytes(tensor.cpu()).numpy().data, place[name][1])
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors never came, first {min(missing)}.")


def _check_arrival(folder: Path, name: str, tensor: torch.Tensor, spec: TensorSpec | None) -> None:
    if spec is None:
        raise CheckpointError(f"{folder}: {name} came twice, or was not announced.")
    if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
        raise CheckpointError(
            f"{folder}: {name} came as {tuple(tensor.shape)} {tensor.dtype}, "
            f"but {spec.shape} {spec.dtype} was announced."
        )


def _write_at(descriptor: int, data: bytes | memoryview, start: int) -> None:
    rest = memoryview(data)
    while rest:  # one call takes at most 2 GiB
        written = os.pwrite(descriptor, rest, start)
        rest, start = rest[written:], start + written


def _write_index(partial: Path, plan: Sequence[Shard], total_bytes: int) -> None:
    file_of = {name: shard.file for shard in plan for name in shard.offsets}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _sync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
