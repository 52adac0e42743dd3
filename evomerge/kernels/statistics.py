"""What holds for every candidate of a search, computed when first asked for.

Gram matrices, magnitude thresholds, L1 norms. Sums are in float64 over fixed pieces in a fixed
order, and selections count integers, so the numbers are the same on every device, for any number of
threads, in a search and in its export. Letters: M models, P elements of one flat tensor.
"""

import math
import struct
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from evomerge.kernels.masks import KEEP_ALL, MaskKey
from evomerge.kernels.reference import delta, kept_deltas, ranges
from evomerge.kernels.tables import Mask

PIECE = 2**15
"""Elements summed at once; sums depend on it in their last bits, so it is no setting."""

SMALL_NORM = 1e-7
"""L1 norm below which a task vector is not rescaled."""

Fact = TypeVar("Fact")


class StatisticsCache:
    """Facts about the tensors of a set of models, kept over the candidates of a search.

    Facts are kept by the models' names, so one cache may serve any recipes as long as a name means
    the same files. Memory: for each tensor and parent the occupied ones of 32 768 magnitude bins
    (12 bytes each, some 1 200 in practice), for float32 checkpoints also the occupied parts of each
    bin that a density led to; and half a kilobyte for each of at most `max_norms` masked norms.
    """

    def __init__(self, max_norms: int = 2**16) -> None:
        self.max_norms = max_norms
        self._facts: dict[Hashable, object] = {}
        self._norms: dict[Hashable, object] = {}

    def fact(self, key: Hashable, compute: Callable[[], Fact]) -> Fact:
        """Return what is kept under a key, computing it when it is not there."""
        if key not in self._facts:
            self._facts[key] = compute()
        return self._facts[key]  # type: ignore[return-value]

    def norm(self, key: Hashable, compute: Callable[[], Fact]) -> Fact:
        """As `fact`, for what most candidates want anew; forgotten when there is too much of it."""
        if key not in self._norms:
            if len(self._norms) >= self.max_norms:
                self._norms.clear()
            self._norms[key] = compute()
        return self._norms[key]  # type: ignore[return-value]


@dataclass(frozen=True)
class Histogram:
    """How many elements have at least a magnitude key, for the keys that occur.

    Attributes:
        keys: Descending, int32.
        counts: Elements with this key or a larger one, int64.
    """

    keys: np.ndarray
    counts: np.ndarray

    def key_at(self, rank: int) -> tuple[int, int]:
        """Return the key of the rank-th largest element (from 1), and how many keys are larger."""
        place = int(np.searchsorted(self.counts, rank))
        return int(self.keys[place]), int(self.counts[place - 1]) if place else 0


@dataclass(frozen=True)
class TensorStatistics:
    """Facts about one tensor of a base and its parents; made anew for each merge of the tensor.

    Attributes:
        name: Name of the tensor.
        base_P: The base's elements, flat, in their stored dtype; None for a method without a base,
            which has no task vectors and so no use for any of these facts.
        source_MP: The parents' elements, flat, in recipe order.
        base: Name of the base.
        models: Names of the parents.
        mask_seed: Seed of the recipe's random masks.
        cache: Where facts are kept.
        shape: Shape of the tensor; None where it is flat.
    """

    name: str
    base_P: torch.Tensor | None
    source_MP: Sequence[torch.Tensor]
    base: str | None
    models: tuple[str, ...]
    mask_seed: int = 0
    cache: StatisticsCache = field(default_factory=StatisticsCache)
    shape: tuple[int, ...] | None = None

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape of the tensor, also where none was given."""
        return (len(self.source_MP[0]),) if self.shape is None else self.shape

    @property
    def mask_key(self) -> MaskKey:
        """What the tensor's random masks are drawn for."""
        return MaskKey(self.mask_seed, self.name)

    @property
    def _subtracted_P(self) -> torch.Tensor:
        assert self.base_P is not None, "a method without a base asked for a fact on task vectors"
        return self.base_P

    def gram(self) -> tuple[tuple[float, ...], ...]:
        """Return the inner products of base, first task vector, second task vector, and so on.

        In float64. Task vectors rather than parents, which hardly differ: their angles would drown
        in rounding.
        """
        return self.cache.fact(("gram", self.name, self.base, self.models), self._gram)

    def _gram(self) -> tuple[tuple[float, ...], ...]:
        size = 1 + len(self.source_MP)
        parts: dict[tuple[int, int], list[float]] = {
            (i, j): [] for i in range(size) for j in range(i, size)
        }
        for start, stop in ranges(len(self._subtracted_P), PIECE):
            base_P = self._subtracted_P[start:stop].float()
            deltas = [delta(source_P[start:stop], base_P) for source_P in self.source_MP]
            rows = [row_P.double() for row_P in (base_P, *deltas)]
            for (i, j), part in parts.items():
                part.append(tree_sum(rows[i] * rows[j]))
        sums = {pair: math.fsum(part) for pair, part in parts.items()}
        return tuple(tuple(sums[min(i, j), max(i, j)] for j in range(size)) for i in range(size))

    def threshold(self, model: int, density: float) -> float:
        """Return the smallest magnitude kept when a task vector keeps its largest elements.

        max(1, floor(density * P)) elements are kept, and all that equal the last of them; density
        0 keeps none. Magnitudes are compared at the precision of the checkpoints: where base and
        parent have one 16-bit dtype, |delta| is rounded to it, so that elements which the
        checkpoints cannot tell apart are kept or dropped together.

        Args:
            model: Position of the parent.
            density: Share to keep, in [0, 1].

        Returns:
            A float32 number t such that exactly these have `|delta| >= t`; 0 for all, infinity for
            none.
        """
        size = len(self._subtracted_P)
        if density >= 1 or size == 0:
            return 0.0
        if density <= 0:
            return math.inf
        rank = max(1, int(density * size))
        key, num_larger = self._histogram(model).key_at(rank)
        dtype = self._key_dtype(model)
        if dtype is not torch.float32:
            return smallest_rounding_to(key, dtype)
        low, _ = self._histogram(model, within=key).key_at(rank - num_larger)
        return _float32(key << 16 | low)

    def _key_dtype(self, model: int) -> torch.dtype:
        same = self._subtracted_P.dtype is self.source_MP[model].dtype
        return self._subtracted_P.dtype if same else torch.float32

    def _histogram(self, model: int, within: int | None = None) -> Histogram:
        key = ("histogram", self.name, self.base, self.models[model], within)
        return self.cache.fact(key, lambda: self._count_keys(model, within))

    def _count_keys(self, model: int, within: int | None) -> Histogram:
        """Count magnitudes by their upper 15 bits, or those `within` one bin by their lower 16."""
        dtype = self._key_dtype(model)
        counts = torch.zeros(2**16, dtype=torch.int64, device=self._subtracted_P.device)
        for start, stop in ranges(len(self._subtracted_P), PIECE):
            base_P = self._subtracted_P[start:stop].float()
            magnitude_P = delta(self.source_MP[model][start:stop], base_P).abs_()
            if dtype is not torch.float32:
                keys = magnitude_P.to(dtype).view(torch.int16).long()
            else:
                bits = magnitude_P.view(torch.int32).long()
                keys = bits >> 16 if within is None else bits[bits >> 16 == within] & 0xFFFF
            counts += torch.bincount(keys, minlength=2**16)
        found = counts.nonzero().flatten().flip(0)
        return Histogram(found.int().cpu().numpy(), counts[found].cumsum(0).cpu().numpy())

    def rescales(
        self, thresholds: tuple[float, ...], keep_levels: tuple[int, ...]
    ) -> tuple[float, ...]:
        """Return each task vector's L1 norm divided by what dropping elements leaves of it.

        The factor is 1 where either is below `SMALL_NORM`: there is nothing to restore.

        Args:
            thresholds: Smallest magnitude kept; see `Mask`.
            keep_levels: Share kept at random; see `Mask`.
        """
        everything = (0.0,) * len(self.models), (KEEP_ALL,) * len(self.models)
        kept = (thresholds, keep_levels)
        key = ("l1", self.name, self.base, self.models)
        before = after = self.cache.fact(key, lambda: self._l1_norms(*everything))
        if kept != everything:
            key_kept = (*key, self.mask_seed, kept)
            after = self.cache.norm(key_kept, lambda: self._l1_norms(*kept))
        return tuple(
            b / a if min(a, b) >= SMALL_NORM else 1.0 for b, a in zip(before, after, strict=True)
        )

    def _l1_norms(
        self, thresholds: tuple[float, ...], keep_levels: tuple[int, ...]
    ) -> tuple[float, ...]:
        ones = (1.0,) * len(self.models)
        table = Mask(ones, ones, thresholds, keep_levels, self.mask_key)
        parts: list[list[float]] = [[] for _ in self.models]
        for start, stop in ranges(len(self._subtracted_P), PIECE):
            base_P = self._subtracted_P[start:stop].float()
            sources = [source_P[start:stop] for source_P in self.source_MP]
            kept_MP = kept_deltas(table, base_P, sources, start)
            for part, kept_P in zip(parts, kept_MP, strict=True):
                part.append(tree_sum(kept_P.abs_().double()))
        return tuple(math.fsum(part) for part in parts)


def tree_sum(value_P: torch.Tensor) -> float:
    """Add up a float64 tensor by halving it: the order of additions depends on its length alone."""
    while (size := len(value_P)) > 1:
        half = (size + 1) // 2
        folded_P = value_P[:half].clone()
        folded_P[: size - half] += value_P[half:]
        value_P = folded_P
    return float(value_P.sum())


def is_finite(tensor_P: torch.Tensor) -> bool:
    """Whether a flat tensor holds neither NaN nor Inf."""
    pieces = (tensor_P[start:stop] for start, stop in ranges(len(tensor_P), PIECE))
    # a sum is finite only if all its terms are, and far cheaper; one that overflows proves nothing
    return all(bool(p.sum(dtype=torch.float32).isfinite() or p.isfinite().all()) for p in pieces)


def smallest_rounding_to(key: int, dtype: torch.dtype) -> float:
    """Return the smallest float32 that rounds to a 16-bit float (to nearest, ties to even).

    Args:
        key: Bits of the 16-bit number, which is not negative.
        dtype: `torch.bfloat16` or `torch.float16`.
    """
    if key == 0:
        return 0.0
    # half-way to the number below; that itself rounds to whichever of the two is even
    if dtype is torch.bfloat16:
        return _float32((key << 16) - 0x8000 + (key & 1))
    middle = np.float32((_float16(key - 1) + _float16(key)) / 2)
    return float(np.nextafter(middle, np.float32(np.inf)) if key & 1 else middle)


def _float16(bits: int) -> float:
    if bits == 0x7C00:  # infinity: what the next power of two rounds to
        return 65536.0
    return float(np.uint16(bits).view(np.float16))


def _float32(bits: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value
