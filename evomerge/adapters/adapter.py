"""Adapter: low-rank factors and replaced tensors, by the names of a model's tensors.

Letters: R rank, I inputs, O outputs of a module; P rows and Q columns of the tensor as stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

_BLOCK = 2**20
"""Elements of a tensor that are adapted at once, in float64."""


@dataclass(frozen=True)
class LowRank:
    """What is added to one tensor: `scale * b_OR @ a_RI`, transposed where it is stored so.

    Attributes:
        module: Name of the module, as the adapter's file has it.
        a_RI: First factor, in the dtype of the adapter's file.
        b_OR: Second factor.
        scale: A number such as alpha / rank.
        transposed: Whether the tensor is stored inputs first: embeddings, GPT-2's Conv1D.
        embedding: Whether the module is an embedding, whose factors PEFT names differently.
    """

    module: str
    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float
    transposed: bool = False
    embedding: bool = False

    @property
    def rank(self) -> int:
        """Rows of the first factor."""
        return self.a_RI.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the tensor, as stored."""
        rows, columns = self.b_OR.shape[0], self.a_RI.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)

    def added_to(self, base_PQ: torch.Tensor) -> torch.Tensor:
        """Return `base_PQ` plus the product, float32; computed in float64 and rounded once.

        In float64 the order in which threads add shows in the result at most once in a billion
        elements.
        """
        left_PR, right_RQ = (
            (self.a_RI.T, self.b_OR.T) if self.transposed else (self.b_OR, self.a_RI)
        )
        right_RQ = right_RQ.double() * self.scale
        out_PQ = torch.empty(base_PQ.shape, dtype=torch.float32)
        rows = max(1, _BLOCK // base_PQ.shape[1])
        for start in range(0, base_PQ.shape[0], rows):
            part = slice(start, start + rows)
            out_PQ[part] = base_PQ[part].double() + left_PR[part].double() @ right_RQ
        return out_PQ


@dataclass(frozen=True)
class Adapter:
    """An adapter bound to a model.

    Attributes:
        label: How messages name it.
        low_rank: Name of the model's tensor to what is added to it.
        saved: Name of the model's tensor to the one that replaces it (PEFT's modules_to_save);
            where there is a low-rank part too, that is added to the replacement.
        written: Name of each replaced tensor to the one that the adapter's file has for it.
        ties_head: Whether a head that uses the embedding in its place follows the adapted one.
    """

    label: str
    low_rank: Mapping[str, LowRank]
    saved: Mapping[str, torch.Tensor]
    written: Mapping[str, str]
    ties_head: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors, as stored."""
        factors = [t for part in self.low_rank.values() for t in (part.a_RI, part.b_OR)]
        return sum(tensor.nbytes for tensor in [*factors, *self.saved.values()])
