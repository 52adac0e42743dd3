"""AlignedSource: a model whose embedding and head have the rows of another vocabulary.

Letters: M models, R rows of the new vocabulary.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from typing_extensions import override

from evomerge.checkpoints.source import TensorSource

ZERO, MEAN, PADDING = -1, -2, -3
"""In `Rows.fill_R`: a row of zeros, the mean of the models that have the token, no token at all."""

_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Rows:
    """Where each model takes each row of the new vocabulary from; all int64.

    Attributes:
        own_MR: Row of the model's own matrix; -1 where it is filled instead.
        fill_R: What it is filled with: the model of this index, or ZERO, MEAN, PADDING.
        row_R: Row of that model's matrix; without meaning for the others.
    """

    own_MR: torch.Tensor
    fill_R: torch.Tensor
    row_R: torch.Tensor

    @cached_property
    def have_means(self) -> bool:
        """Whether some row is a mean."""
        return bool((self.fill_R[(self.own_MR < 0).any(0)] <= MEAN).any())

    def digest(self, models: Iterable[str]) -> str:
        """Return the SHA-256, in hexadecimal, of where every row is from and the models' names."""
        facts = [list(models), self.own_MR.tolist(), self.fill_R.tolist(), self.row_R.tolist()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def num_rows(self) -> int:
        """Rows of the new vocabulary, padding included."""
        return self.fill_R.numel()


class AlignedSource(TensorSource):
    """One of several models, with rows re-ordered and filled as they are read.

    The tensors concerned are of the dtype that holds every model's numbers exactly (float32 for
    bfloat16 with float16), and float32 where a row is a mean, which is not rounded any further.
    Padding has the mean of all rows before it.

    Args:
        sources: All models, in the order of `rows`.
        index: Which of them this is.
        rows: Where the rows are from.
        names: Tensors whose first dimension is the vocabulary.
    """

    def __init__(
        self, sources: Sequence[TensorSource], index: int, rows: Rows, names: Collection[str]
    ) -> None:
        self.label = sources[index].label
        self._sources, self._index = tuple(sources), index
        self._own = sources[index]
        self._rows, self._aligned = rows, frozenset(names)

    @property
    @override
    def tied(self) -> Mapping[str, str]:
        return self._own.tied

    @override
    def names(self) -> tuple[str, ...]:
        return self._own.names()

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._own.shape(name)
        return (self._rows.num_rows, *shape[1:]) if name in self._aligned else shape

    @override
    def dtype(self, name: str) -> torch.dtype:
        if name not in self._aligned:
            return self._own.dtype(name)
        dtypes = [source.dtype(name) for source in self._sources if name in source]
        means = [torch.float32] if self._rows.have_means else []
        return reduce(torch.promote_types, [*dtypes, *means])

    @override
    def merged_dtype(self, name: str) -> torch.dtype:
        return self._own.merged_dtype(name)

    @override
    def read(self, name: str) -> torch.Tensor:
        own = self._own.read(name)
        if name not in self._aligned:
            return own
        own_R = self._rows.own_MR[self._index]
        # lacking rows are overwritten below
        matrix = own.index_select(0, own_R.clamp(min=0)).to(self.dtype(name))
        lacking_R = own_R < 0
        for model in self._rows.fill_R[lacking_R].unique().tolist():
            picked = (lacking_R & (self._rows.fill_R == model)).nonzero().flatten()
            if model >= 0:
                donated = self._sources[model].read(name)[self._rows.row_R[picked]]
                matrix[picked] = donated.to(matrix.dtype)
            elif model == ZERO:
                matrix[picked] = 0
            elif model == MEAN:
                matrix[picked] = self._mean_over_models(name, picked).to(matrix.dtype)
        self._pad(matrix)
        return matrix

    def _mean_over_models(self, name: str, picked: torch.Tensor) -> torch.Tensor:
        """Return the picked rows' means over the models that have them, float32."""
        total = torch.zeros(picked.numel(), *self._own.shape(name)[1:])
        for own_R, source in zip(self._rows.own_MR, self._sources, strict=True):
            has = (own_R[picked] >= 0).nonzero().flatten()
            if has.numel():
                total[has] += source.read(name)[own_R[picked[has]]]
        count = (self._rows.own_MR[:, picked] >= 0).sum(0)
        return total / count.reshape(-1, *[1] * (total.dim() - 1))

    def _pad(self, matrix: torch.Tensor) -> None:
        padding_R = self._rows.fill_R == PADDING
        if padding_R.any():
            total = torch.zeros(matrix.shape[1:], dtype=torch.float64)
            used = (~padding_R).nonzero().flatten()
            for block in used.split(_BLOCK_ROWS):
                total += matrix[block].double().sum(0)
            matrix[padding_R] = (total / used.numel()).to(matrix.dtype)
