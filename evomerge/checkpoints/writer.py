"""Write a checkpoint: shards planned ahead, streamed, that appear whole or not at all.

A checkpoint that was interrupted is gone on with shard by shard where its writer says what it is
made of.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

from evomerge.checkpoints.index import TensorEntry
from evomerge.checkpoints.partial import (
    JOURNAL,
    Finished,
    adopt,
    leftovers,
    note_shard,
    partial_path,
    read_journal,
    start_journal,
)
from evomerge.checkpoints.reader import read_entry
from evomerge.checkpoints.shards import Shard, TensorSpec, plan_shards
from evomerge.checksums import Checksum, as_bytes, checksum_of
from evomerge.errors import CheckpointError

GIB = 2**30


class CheckpointWriter:
    """Writes a checkpoint in a hidden folder beside the target and renames it at the end.

    Use as a context manager: `write` each tensor of `missing`, then `finish`. Whatever goes wrong,
    the hidden folder is removed - unless an identity is given, some shard is finished, and the
    process was killed or told to stop (Ctrl-C): then the next writer of the same target and
    identity keeps the finished shards. A finished shard has been synced, its checksums are in a
    journal, and it is read again before it is kept. The same tensors give the same bytes.

    Args:
        folder: Where the checkpoint is to be; must not exist, or be empty.
        specs: What will arrive; each name once, dtypes of `index.STORED_DTYPES`.
        shard_bytes: Most bytes of tensors in a file.
        identity: Everything that the tensors' bits depend on, in any words; None keeps nothing.

    Attributes:
        path: The hidden folder.
        missing: Tensors that are still to be written, by name, sorted by name.
        num_tensors: Tensors of the checkpoint.
        checksums: Checksums of the tensors that are written, by name.
        resumed: File names of the shards that an earlier process finished.

    Raises:
        CheckpointError: (on entering) The target is not empty, or the disk has too little room or
            cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        shard_bytes: int = 5 * GIB,
        identity: str | None = None,
    ) -> None:
        self.folder = folder
        self.path = partial_path(folder, os.getpid())
        self.missing = {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}
        self.num_tensors = len(specs)
        self.checksums: dict[str, Checksum] = {}
        self.resumed: tuple[str, ...] = ()
        self._plan = plan_shards(specs, shard_bytes)
        self._total_bytes = sum(spec.num_bytes for spec in specs)
        self._identity = None if identity is None else _with_layout(identity, self._plan)
        self._shard_of = {name: shard for shard in self._plan for name in shard.offsets}
        self._num_missing = {shard.file: len(shard.offsets) for shard in self._plan}
        self._open: dict[str, int] = {}
        self._finished: Finished = {}

    def __enter__(self) -> "CheckpointWriter":
        with _disk_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            _check_empty(self.folder)
            left = self._choose_leftover()
            for path in leftovers(self.folder):
                if path != left:
                    shutil.rmtree(path, ignore_errors=True)
            todo = [shard for shard in self._plan if shard.file not in self._finished]
            _check_room(self.folder, sum(shard.num_bytes for shard in todo))
            if left:
                adopt(left, self.path, self._finished)
            else:
                self.path.mkdir()
        try:
            self._start(todo)
        except Exception:
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        return self

    def _choose_leftover(self) -> Path | None:
        """Return the hidden folder to go on with, and note which of its shards are good."""
        if self._identity is None:
            return None
        found = {path: read_journal(path, self._identity) for path in leftovers(self.folder)}
        path = max(found, key=lambda path: len(found[path]), default=None)
        if path is None:
            return None
        for shard in self._plan:
            checksums = found[path].get(shard.file)
            if checksums and _is_intact(path / shard.file, shard, checksums, self.missing):
                self._finished[shard.file] = checksums
        return path if self._finished else None

    def _start(self, todo: Sequence[Shard]) -> None:
        for checksums in self._finished.values():
            self.checksums |= checksums
            for name in checksums:
                del self.missing[name]
        self.resumed = tuple(self._finished)
        with _disk_errors(self.folder):
            if self._identity is not None:
                start_journal(self.path, self._identity, self._finished)
            for shard in todo:
                with (self.path / shard.file).open("wb", buffering=0) as file:
                    _write_at(file.fileno(), shard.header, 0)
                    # a file of empty tensors only ends with its header
                    os.ftruncate(file.fileno(), shard.num_bytes)

    def write(self, name: str, tensor: torch.Tensor, checksum: Checksum | None = None) -> None:
        """Write one tensor of `missing`, on any device; in whatever order they come.

        Shards are finished early where tensors come sorted by name.

        Args:
            name: Of the tensor.
            tensor: Its elements.
            checksum: Of the tensor, where it is known; None takes it.

        Raises:
            CheckpointError: The tensor is not missing, or of another shape or dtype than was
                announced; or the disk is full or fails.
        """
        _check_arrival(self.folder, name, tensor, self.missing.pop(name, None))
        tensor = tensor.cpu()
        shard = self._shard_of[name]
        with _disk_errors(self.folder):
            if shard.file not in self._open:
                self._open[shard.file] = os.open(self.path / shard.file, os.O_WRONLY)
            data = as_bytes(tensor).numpy().data
            _write_at(self._open[shard.file], data, shard.offsets[name])
            self.checksums[name] = checksum or checksum_of(tensor)
            self._num_missing[shard.file] -= 1
            if not self._num_missing[shard.file]:
                self._finish_shard(shard)

    def _finish_shard(self, shard: Shard) -> None:
        descriptor = self._open.pop(shard.file)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._finished[shard.file] = {name: self.checksums[name] for name in shard.offsets}
        if self._identity is not None:
            note_shard(self.path, shard.file, self._finished[shard.file])

    def finish(self, write_sidecars: Callable[[Path], None]) -> None:
        """Add what is not a tensor, sync everything, and let the checkpoint appear.

        Args:
            write_sidecars: Called with the hidden folder.

        Raises:
            CheckpointError: Tensors are missing, or the disk is full or fails.
        """
        if self.missing:
            raise CheckpointError(
                f"{self.folder}: {len(self.missing)} tensors never came, first {min(self.missing)}."
            )
        with _disk_errors(self.folder):
            if len(self._plan) > 1:
                _write_index(self.path, self._plan, self._total_bytes)
            write_sidecars(self.path)
            beside = [path for path in self.path.rglob("*") if path.name not in self._finished]
            _sync(*beside, self.path)
            (self.path / JOURNAL).unlink(missing_ok=True)
            self.path.rename(self.folder)
            _sync(self.folder.parent)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        stopped = kind is not None and not issubclass(kind, Exception)
        if not (stopped and self._identity is not None and self._finished):
            shutil.rmtree(self.path, ignore_errors=True)


def write_checkpoint(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    specs: Sequence[TensorSpec],
    write_sidecars: Callable[[Path], None],
    shard_bytes: int = 5 * GIB,
) -> None:
    """Write tensors and sidecars as a checkpoint that appears whole or not at all.

    One tensor is held at a time. Nothing is kept of what was interrupted; see `CheckpointWriter`.

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
    with CheckpointWriter(folder, specs, shard_bytes) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
        writer.finish(write_sidecars)


def _with_layout(identity: str, plan: Sequence[Shard]) -> str:
    digest = hashlib.sha256(identity.encode())
    for shard in plan:
        digest.update(shard.file.encode() + shard.header)
    return digest.hexdigest()


def _is_intact(
    path: Path, shard: Shard, checksums: Mapping[str, Checksum], specs: Mapping[str, TensorSpec]
) -> bool:
    """Whether a shard has its header, and every tensor the bits that were written."""
    try:
        with path.open("rb") as file:
            if file.read(len(shard.header)) != shard.header:
                return False
        if path.stat().st_size != shard.num_bytes or checksums.keys() != shard.offsets.keys():
            return False
        for name, start in shard.offsets.items():
            spec = specs[name]
            entry = TensorEntry(path, start, spec.num_bytes, spec.dtype, spec.shape)
            if checksum_of(read_entry(entry, path.name)) != checksums[name]:
                return False
    except (OSError, CheckpointError):
        return False  # whatever cannot be read is written anew
    return True


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


def _check_empty(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(
            f"{folder}: exists and is not an empty folder. Choose another, or remove it."
        )


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes:
        raise CheckpointError(
            f"{folder}: needs {num_bytes / GIB:.2f} GiB, {free / GIB:.2f} GiB free. "
            "Free some space or choose another folder."
        )


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
