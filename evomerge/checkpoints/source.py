"""TensorSource: where the tensors of one model come from. MemorySource holds them in memory."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from typing_extensions import override

from evomerge.errors import CheckpointError
from evomerge.registry import did_you_mean


class TensorSource(ABC):
    """The named tensors of one model, read one at a time. Never changes once made."""

    label: str
    """How messages name the model."""

    holds_tensors = False
    """Whether its tensors are in memory or mapped all the time, so that reading takes no memory."""

    @property
    def tied(self) -> Mapping[str, str]:
        """Name left out because the model uses another tensor in its place -> that one's name."""
        return {}

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Return every tensor's name in canonical order: sorted, whatever files hold them."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it.

        Raises:
            CheckpointError: The model has no such tensor.
        """

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's stored dtype without reading it.

        Raises:
            CheckpointError: The model has no such tensor.
        """

    def merged_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a merge's tensor where this model decides: as it is stored.

        Raises:
            CheckpointError: The model has no such tensor.
        """
        return self.dtype(name)

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, contiguous, in its stored dtype; on the CPU, or where an arena holds it.

        It may alias a read-only memory map or the source's own memory: never write to it.

        Raises:
            CheckpointError: The model has no such tensor.
        """

    def __contains__(self, name: object) -> bool:
        return name in self.names()


class MemorySource(TensorSource):
    """Tensors of a dict, which is taken as it is, and not to be written to from then on.

    Args:
        tensors: Name and contiguous CPU tensor, in any order.
        label: How messages name the model.
        tied: As `TensorSource.tied`.
    """

    holds_tensors = True

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        label: str = "memory",
        tied: Mapping[str, str] | None = None,
    ) -> None:
        self.label = label
        self._tensors = {name: tensors[name] for name in sorted(tensors)}
        self._names = tuple(self._tensors)
        self._tied = dict(tied or {})

    @property
    @override
    def tied(self) -> Mapping[str, str]:
        return self._tied

    @override
    def names(self) -> tuple[str, ...]:
        return self._names

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._find(name).shape)

    @override
    def dtype(self, name: str) -> torch.dtype:
        return self._find(name).dtype

    @override
    def read(self, name: str) -> torch.Tensor:
        return self._find(name)

    @override
    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def _find(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise CheckpointError(
                f"{self.label}: has no tensor {name!r}.{did_you_mean(name, self._names)}"
            )
        return self._tensors[name]


def hold(source: TensorSource) -> MemorySource:
    """Read every tensor once into memory of its own, so that later reads touch no file."""
    tensors = {name: source.read(name).clone() for name in source.names()}
    return MemorySource(tensors, source.label, source.tied)
