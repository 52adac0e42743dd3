"""Arenas: all tensors of a model in one buffer for each device and dtype, and how they get there.

A search on a GPU holds its sources like that, and its live model (`adopt`); on a CPU sources stay
memory maps, which all workers of a machine share.
"""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from typing_extensions import override

from evomerge.checkpoints.index import TensorEntry, find_files, index_tensors
from evomerge.checkpoints.reader import LazyCheckpoint
from evomerge.checkpoints.shards import TensorSpec
from evomerge.checkpoints.source import MemorySource, TensorSource
from evomerge.checksums import as_bytes
from evomerge.errors import CheckpointError

ALIGNMENT = 4096
"""Elements that every tensor's start is a multiple of: whole blocks of any kernel, whole vectors of
16 bytes whatever the dtype."""

STAGING_BYTES = 2**26
"""Size of each of the two host buffers through which files reach a GPU."""

_MOST_PARTS = 1024
"""Buffers that one call of `preadv` takes (IOV_MAX on Linux)."""

Device = torch.device | str


class BufferKey(NamedTuple):
    """Which buffer of an arena."""

    device: torch.device
    dtype: torch.dtype


class Place(NamedTuple):
    """Where a tensor lies: from element `start` of a buffer on, contiguous."""

    buffer: BufferKey
    start: int
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ArenaLayout:
    """Where each tensor of a model lies, by names, shapes and dtypes alone; see `lay_out`.

    Attributes:
        places: By name, in canonical order: sorted, so gate and up of a layer follow each other,
            and k, o, q, v do; files that were saved in one piece have the same order.
        sizes: Elements of each buffer, padding included.
    """

    places: Mapping[str, Place]
    sizes: Mapping[BufferKey, int]

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(size * key.dtype.itemsize for key, size in self.sizes.items())

    @property
    def padding_share(self) -> float:
        """Share of the bytes that belongs to no tensor."""
        used = sum(p.num_elements * p.buffer.dtype.itemsize for p in self.places.values())
        return 1 - used / self.num_bytes if self.num_bytes else 0.0


def lay_out(tensors: Iterable[TensorSpec], devices: Device | Mapping[str, Device]) -> ArenaLayout:
    """Lay tensors one after another, each from a multiple of `ALIGNMENT` elements on.

    The result depends on nothing else, so all models of one architecture, vocabulary and dtype have
    the same layout.

    Args:
        tensors: In any order.
        devices: Where they are to lie: all on one device, or each name's own, as a model that is
            spread over several GPUs has them.
    """
    places: dict[str, Place] = {}
    sizes: dict[BufferKey, int] = {}
    for tensor in sorted(tensors, key=lambda spec: spec.name):
        device = devices[tensor.name] if isinstance(devices, Mapping) else devices
        key = BufferKey(torch.device(device), tensor.dtype)
        start = sizes.get(key, 0)
        places[tensor.name] = Place(key, start, tensor.shape)
        sizes[key] = start + -(-tensor.num_elements // ALIGNMENT) * ALIGNMENT
    return ArenaLayout(places, sizes)


def layout_for(source: TensorSource, devices: Device | Mapping[str, Device]) -> ArenaLayout:
    """Lay out all tensors of a model in their stored dtypes; see `lay_out`."""
    specs = [TensorSpec(name, source.shape(name), source.dtype(name)) for name in source.names()]
    return lay_out(specs, devices)


@dataclass(frozen=True)
class Arena:
    """Memory for the tensors of a layout. What lies between the tensors is undefined.

    Attributes:
        layout: Where each tensor lies.
        buffers: Flat tensors of the layout's sizes.
    """

    layout: ArenaLayout
    buffers: Mapping[BufferKey, torch.Tensor]

    def view(self, name: str) -> torch.Tensor:
        """Return a tensor's own memory, in its shape."""
        place = self.layout.places[name]
        flat_P = self.buffers[place.buffer][place.start : place.start + place.num_elements]
        return flat_P.view(place.shape)


def allocate(layout: ArenaLayout, pinned: bool = False) -> Arena:
    """Make an arena; what its tensors hold is undefined.

    Args:
        layout: Where each tensor is to lie.
        pinned: Whether buffers in host memory are locked there, so that a GPU copies from them
            while it computes; needs a CUDA device. torch rounds such a buffer up to a power of two
            bytes.
    """
    buffers = {}
    for key, size in layout.sizes.items():
        locked = pinned and key.device.type == "cpu"
        buffers[key] = torch.empty(size, dtype=key.dtype, device=key.device, pin_memory=locked)
    return Arena(layout, buffers)


class ArenaSource(MemorySource):
    """A model in an arena; `read` gives views of it, on the device where they lie.

    Args:
        arena: Holds the model's tensors; not to be written to from then on.
        source: The model, for its label, tied names and `merged_dtype`; not kept.
    """

    def __init__(self, arena: Arena, source: TensorSource) -> None:
        views = {name: arena.view(name) for name in arena.layout.places}
        super().__init__(views, source.label, source.tied)
        self.arena = arena
        self._merged_dtypes = {name: source.merged_dtype(name) for name in self.names()}

    @override
    def merged_dtype(self, name: str) -> torch.dtype:
        self._find(name)
        return self._merged_dtypes[name]


def load_arena(source: TensorSource, layout: ArenaLayout, pinned: bool = False) -> ArenaSource:
    """Load a model into a new arena; see `fill`.

    Args:
        source: The model.
        layout: As `layout_for` makes it for this model.
        pinned: As for `allocate`.

    Raises:
        CheckpointError: As `fill`.
    """
    arena = allocate(layout, pinned)
    fill(arena, source)
    return ArenaSource(arena, source)


def fill(arena: Arena, source: TensorSource, staging_bytes: int | None = None) -> None:
    """Overwrite an arena with a model.

    safetensors files are read straight into it, or to a GPU through two pinned host buffers that
    take turns; any other source (pickles, adapters, aligned vocabularies) is read and copied tensor
    by tensor.

    Args:
        arena: Laid out for this model.
        source: The model.
        staging_bytes: Size of the host buffers; None is none for host memory, and `STAGING_BYTES`
            for other devices.

    Raises:
        CheckpointError: A file cannot be read, has become shorter, or has changed since the source
            was opened; or the model is not the layout's.
    """
    entries = _entries_of(source)
    _check(source, arena.layout, entries)
    devices = {buffer.device for buffer in arena.buffers.values()}
    if staging_bytes is None and any(device.type != "cpu" for device in devices):
        staging_bytes = STAGING_BYTES
    staging = _Staging(staging_bytes, devices) if staging_bytes else None
    for stretch in _stretches(entries):
        parts = [as_bytes(arena.view(name)) for name, _ in stretch]
        _, first = stretch[0]
        if staging is None:
            _read_into(parts, first.start, first, source.label)
        else:
            staging.read_into(parts, first, source.label)
    if staging is not None:
        staging.finish()
    for name in arena.layout.places:
        if name not in entries:
            arena.view(name).copy_(source.read(name))


def _entries_of(source: TensorSource) -> dict[str, TensorEntry]:
    """Return where a model's tensors lie in safetensors files; nothing for other sources."""
    if not isinstance(source, LazyCheckpoint):
        return {}
    files = find_files(source.folder, source.label)
    entries = {} if files.pickled else index_tensors(files, source.label)
    return {name: entry for name, entry in entries.items() if name in source}


def _check(source: TensorSource, layout: ArenaLayout, entries: Mapping[str, TensorEntry]) -> None:
    if source.names() != tuple(layout.places):
        raise CheckpointError(f"{source.label}: has other tensors than the arena is laid out for.")
    for name, place in layout.places.items():
        wanted = place.shape, place.buffer.dtype
        if (source.shape(name), source.dtype(name)) != wanted:
            raise CheckpointError(
                f"{source.label}: {name} is {source.shape(name)} {source.dtype(name)}, the arena "
                f"is laid out for {place.shape} {place.buffer.dtype}."
            )
        entry = entries.get(name)
        if entry is not None and (entry.shape, entry.dtype) != wanted:
            raise CheckpointError(
                f"{source.label}: {entry.path.name} has changed since it was opened. Start again."
            )


def _stretches(entries: Mapping[str, TensorEntry]) -> Iterator[list[tuple[str, TensorEntry]]]:
    """Yield tensors that follow each other in one file without a gap, to be read together."""
    stretch: list[tuple[str, TensorEntry]] = []
    held = [item for item in entries.items() if item[1].num_bytes]
    for name, entry in sorted(held, key=lambda item: (item[1].path, item[1].start)):
        if stretch:
            _, last = stretch[-1]
            if (entry.path, entry.start) != (last.path, last.start + last.num_bytes):
                yield stretch
                stretch = []
        stretch.append((name, entry))
    if stretch:
        yield stretch


def _read_into(parts: Sequence[torch.Tensor], start: int, entry: TensorEntry, label: str) -> None:
    """Read consecutive bytes of an entry's file into flat uint8 tensors on the CPU, in turn."""
    rest = deque(part.numpy().data for part in parts)
    try:
        with entry.path.open("rb", buffering=0) as file:
            while rest:  # one call gives at most 2 GiB
                count = os.preadv(file.fileno(), list(islice(rest, _MOST_PARTS)), start)
                if not count:
                    raise CheckpointError(
                        f"{label}: {entry.path.name} has become {sum(map(len, rest))} bytes "
                        "shorter while it was read. Download it again."
                    )
                start += count
                while rest and count >= len(rest[0]):
                    count -= len(rest.popleft())
                if count:
                    rest[0] = rest[0][count:]
    except OSError as error:
        raise CheckpointError(
            f"{label}: {entry.path.name} cannot be read ({error.strerror})."
        ) from error


class _Staging:
    """Two host buffers that take turns: one is read into while the other is copied from."""

    def __init__(self, num_bytes: int, devices: Iterable[torch.device]) -> None:
        gpus = [device for device in devices if device.type == "cuda"]
        self._buffers = [
            torch.empty(num_bytes, dtype=torch.uint8, pin_memory=bool(gpus)) for _ in range(2)
        ]
        self._streams = {device: torch.cuda.Stream(device) for device in gpus}
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        self._copied: list[list[torch.cuda.Event]] = [[], []]

    def read_into(self, parts: Sequence[torch.Tensor], entry: TensorEntry, label: str) -> None:
        """As `_read_into` from the entry's start on, for parts on any device."""
        start = entry.start
        for piece in _pieces(parts, len(self._buffers[0])):
            for event in self._copied[0]:
                event.synchronize()
            sizes = [len(part) for part in piece]
            staged = self._buffers[0][: sum(sizes)]
            _read_into([staged], start, entry, label)
            for part, data in zip(piece, staged.split(sizes), strict=True):
                with torch.cuda.stream(self._streams.get(part.device)):
                    part.copy_(data, non_blocking=True)
            self._copied[0] = [stream.record_event() for stream in self._streams.values()]
            self._buffers.reverse()
            self._copied.reverse()
            start += len(staged)

    def finish(self) -> None:
        """Wait until everything has arrived."""
        for stream in self._streams.values():
            stream.synchronize()


def _pieces(parts: Sequence[torch.Tensor], most: int) -> Iterator[list[torch.Tensor]]:
    """Cut flat tensors into groups of at most `most` elements together, in order."""
    piece: list[torch.Tensor] = []
    room = most
    for part in parts:
        while len(part):
            piece.append(part[:room])
            part = part[room:]
            room -= len(piece[-1])
            if not room:
                yield piece
                piece, room = [], most
    if piece:
        yield piece


def adopt(
    model: torch.nn.Module, views: Mapping[str, torch.Tensor], device: Device | None = None
) -> Arena:
    """Move a live model's parameters and buffers into an arena of their own, with what they hold.

    The model goes on as before: what was tied stays tied, and what is saved is the same. A tensor
    that a file holds only a part of (experts that transformers holds in one tensor), or that is not
    contiguous, stays where it is. Views that were taken before are not of the model any more.

    Args:
        model: A module; parameters and buffers that `views` do not know are left alone.
        views: Stored name -> view of the model's memory, as `merging.places.live_views` finds them.
        device: Where the arena is to lie; None leaves every tensor on its device. From a model on
            the CPU to a GPU the live weights are never there twice; `model.to(device)` then moves
            what is left.

    Returns:
        The arena, laid out by the stored names; dtypes are the model's own. Of names that are tied
        it has the first.
    """
    held = _held(model, views)
    wanted = {
        name: tensors[0].device if device is None else device for name, tensors in held.items()
    }
    specs = [
        TensorSpec(name, tuple(tensors[0].shape), tensors[0].dtype)
        for name, tensors in held.items()
    ]
    arena = allocate(lay_out(specs, wanted))
    for name, tensors in held.items():
        view = arena.view(name)
        view.copy_(tensors[0].detach())
        for tensor in tensors:
            tensor.data = view
    return arena


def _held(
    model: torch.nn.Module, views: Mapping[str, torch.Tensor]
) -> dict[str, list[torch.Tensor]]:
    """Return which parameters and buffers a stored tensor is the whole of; several if tied."""
    by_start: dict[int, list[torch.Tensor]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        by_start.setdefault(tensor.data_ptr(), []).append(tensor)
    held = {}
    for name, view in sorted(views.items()):
        tensors = by_start.get(view.data_ptr(), []) if view.numel() else []
        if tensors and all(_same_memory(tensor, view) for tensor in tensors):
            held[name] = tensors
            del by_start[view.data_ptr()]
    return held


def _same_memory(tensor: torch.Tensor, view: torch.Tensor) -> bool:
    kinds = (tensor.dtype, tensor.shape), (view.dtype, view.shape)
    return kinds[0] == kinds[1] and tensor.is_contiguous() and view.is_contiguous()
