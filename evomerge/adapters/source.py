"""AdapterSource: a model with an adapter applied, read tensor by tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from evomerge.adapters.bind import open_adapter
from evomerge.checkpoints.reader import LazyCheckpoint
from evomerge.checkpoints.source import TensorSource


class AdapterSource(TensorSource):
    """The tensors of a model with an adapter applied; nothing is computed before it is read.

    A tensor with a low-rank part is `base + scale * B @ A` in float32, whatever the model is stored
    in: rounded to bfloat16, a small adapter would change nothing. Replaced tensors come in the
    adapter's dtype, all others as the model stores them. `main_dtype` and `merged_dtype` are the
    model's, so that a merge is written in the dtype it would have without adapters. Every read
    computes anew. A pickled one opens the files again where it arrives.

    Args:
        base: The model.
        label: How messages name the two together.
        adapter_folder: Where the adapter lies.

    Raises:
        CheckpointError: As `open_adapter`.
    """

    def __init__(self, base: LazyCheckpoint, label: str, adapter_folder: Path) -> None:
        self.base = base
        self.label = label
        self.adapter_folder = adapter_folder
        self.adapter = open_adapter(adapter_folder, label, base)

    def __reduce__(self) -> tuple[Any, ...]:
        return AdapterSource, (self.base, self.label, self.adapter_folder)

    @property
    def folder(self) -> Path:
        """The model's folder, with its config and tokenizer."""
        return self.base.folder

    @property
    @override
    def tied(self) -> Mapping[str, str]:
        return self.base.tied

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the model and of the adapter, as stored."""
        return self.base.total_bytes + self.adapter.num_bytes

    @property
    def main_dtype(self) -> torch.dtype:
        """The floating dtype that most of the model's elements have.

        Raises:
            CheckpointError: No tensor is of a floating dtype.
        """
        return self.base.main_dtype

    @override
    def names(self) -> tuple[str, ...]:
        return self.base.names()

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    @override
    def dtype(self, name: str) -> torch.dtype:
        if name in self.adapter.low_rank:
            return torch.float32
        saved = self.adapter.saved.get(name)
        return self.base.dtype(name) if saved is None else saved.dtype

    @override
    def merged_dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    @override
    def read(self, name: str) -> torch.Tensor:
        saved = self.adapter.saved.get(name)
        tensor = self.base.read(name) if saved is None else saved.contiguous()
        part = self.adapter.low_rank.get(name)
        return tensor if part is None else part.added_to(tensor)

    @override
    def __contains__(self, name: object) -> bool:
        return name in self.base
