"""How a checkpoint's tensors lie in its files, decided before any of them is there."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from evomerge.checkpoints.index import STORED_DTYPES

_CODE_OF = {dtype: code for code, dtype in STORED_DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        """Numbers it holds."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes it takes in a file."""
        return self.num_elements * self.dtype.itemsize


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
