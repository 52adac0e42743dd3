"""What holds for every candidate of a search, computed when first asked for.

Gram matrices, magnitude thresholds, ranks, L1 norms. Sums are in float64 over fixed pieces in a
fixed order, and selections count integers, so the numbers are the same on every device, for any
number of threads, in a search and in its export. Letters: M models, P elements of one flat tensor.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from evomerge.config.recipe import ThresholdTies
from evomerge.kernels import sums
from evomerge.kernels.histograms import (
    Histogram,
    added,
    count_magnitudes,
    count_numbers,
    key_at,
    smallest_with,
)
from evomerge.kernels.ladders import Ladder, ladder_of
from evomerge.kernels.masks import KEEP_ALL, MaskKey
from evomerge.kernels.ranks import delta_ranks
from evomerge.kernels.sums import Deltas, delta_pieces
from evomerge.kernels.tables import Fused, Mask, TieCut
from evomerge.kernels.tie_cuts import end_of_tied, tied_at

SMALL_NORM = 1e-7
"""L1 norm below which a task vector is not rescaled."""

Fact = TypeVar("Fact")


class StatisticsCache:
    """Facts about the tensors of a set of models, kept over the candidates of a search.

    Facts are kept by the models' names, so one cache may serve any recipes as long as a name means
    the same files. Memory: for each tensor and parent the occupied ones of 32 768 magnitude bins
    (12 bytes each, some 1 200 in practice), for float32 checkpoints also the occupied parts of each
    bin that a density led to; half a kilobyte for each of at most `max_norms` masked norms; and,
    once a method asks for them, the ranks of the task vectors' elements, a byte for each.

    Args:
        max_norms: How many of the facts that most candidates want anew are kept.
        keep_ranks: Whether ranks are kept. A single merge asks for them once, and without them its
            memory does not grow with the models. Holds for merged directions too.
        max_tensor_bytes: Memory for merged directions, which are as large as the tensors in
            float32; what does not fit is computed anew for each candidate.
    """

    def __init__(
        self, max_norms: int = 2**16, keep_ranks: bool = True, max_tensor_bytes: int = 2**32
    ) -> None:
        self.max_norms = max_norms
        self.keep_ranks = keep_ranks
        self.max_tensor_bytes = max_tensor_bytes
        self._facts: dict[Hashable, object] = {}
        self._norms: dict[Hashable, object] = {}
        self._tensors: dict[Hashable, tuple[Hashable, torch.Tensor]] = {}
        self._tensor_bytes = 0

    def fact(self, key: Hashable, compute: Callable[[], Fact]) -> Fact:
        """Return what is kept under a key, computing it when it is not there."""
        if key not in self._facts:
            self._facts[key] = compute()
        return self._facts[key]  # type: ignore[return-value]

    def ranks(self, key: Hashable, compute: Callable[[], Fact]) -> Fact:
        """As `fact`, for what is as large as a tensor."""
        return self.fact(key, compute) if self.keep_ranks else compute()

    def tensor(
        self, key: Hashable, variant: Hashable, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """As `fact`, for a float32 tensor, as long as there is room; only its last variant is kept.

        The caller must not write to what it gets.
        """
        known = self._tensors.get(key)
        if known is not None and known[0] == variant:
            return known[1]
        found = compute()
        growth = found.nbytes - (known[1].nbytes if known else 0)
        if self.keep_ranks and self._tensor_bytes + growth <= self.max_tensor_bytes:
            self._tensors[key] = variant, found
            self._tensor_bytes += growth
        return found

    def norm(self, key: Hashable, compute: Callable[[], Fact]) -> Fact:
        """As `fact`, for what most candidates want anew; forgotten when there is too much of it."""
        if key not in self._norms:
            if len(self._norms) >= self.max_norms:
                self._norms.clear()
            self._norms[key] = compute()
        return self._norms[key]  # type: ignore[return-value]


@dataclass(frozen=True)
class Everything:
    """All the tensors of a merge, for facts that go beyond one of them.

    Attributes:
        name: Tells these tensors of these models from any others.
        tensors: Gives the statistics of every tensor that is merged and not copied, one after
            another, with the same models in all of them.
    """

    name: Hashable
    tensors: "Callable[[], Iterable[TensorStatistics]]"


@dataclass(frozen=True)
class TensorStatistics:
    """Facts about one tensor of a base and its parents; made anew for each merge of the tensor.

    Attributes:
        name: Name of the tensor.
        base_P: The base's elements, flat, in their stored dtype; None for a method without a base,
            which has no task vectors.
        source_MP: The parents' elements, flat, in recipe order.
        base: Name of the base.
        models: Names of the parents.
        mask_seed: Seed of the recipe's random masks.
        cache: Where facts are kept.
        shape: Shape of the tensor; None where it is flat.
        everything: The tensors of the merge; None where this one is all there is.
        threshold_ties: Which elements that tie at a threshold are kept; as in a recipe.
    """

    name: str
    base_P: torch.Tensor | None
    source_MP: Sequence[torch.Tensor]
    base: str | None
    models: tuple[str, ...]
    mask_seed: int = 0
    cache: StatisticsCache = field(default_factory=StatisticsCache)
    shape: tuple[int, ...] | None = None
    everything: Everything | None = None
    threshold_ties: ThresholdTies = "keep"

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

    def fact(self, what: Hashable, compute: Callable[[], Fact]) -> Fact:
        """Return a fact about this tensor of these models, for every candidate of a search.

        Args:
            what: Names the fact, with all that it depends on but the tensor and the models.
            compute: Computes it.
        """
        return self.cache.fact((what, self.name, self.base, self.models), compute)

    def fleeting(self, what: Hashable, compute: Callable[[], Fact]) -> Fact:
        """As `fact`, for what depends on values that most candidates choose anew."""
        return self.cache.norm((what, self.name, self.base, self.models), compute)

    def pieces(self) -> Iterator[list[torch.Tensor]]:
        """Yield consecutive pieces of all task vectors, as new float32 tensors."""
        return delta_pieces(self._subtracted_P, self.source_MP)

    def sums(
        self, terms: Callable[[Deltas], Sequence[torch.Tensor]], fused: Fused | None = None
    ) -> tuple[float, ...]:
        """Return the sums of the tensors that an expression makes; see `sums.term_sums`."""
        return sums.term_sums(self._subtracted_P, self.source_MP, terms, fused)

    def largest(
        self, what: Hashable, rank: int, magnitude: Callable[[Deltas], torch.Tensor]
    ) -> float:
        """Return the rank-th largest (from 1) of the numbers that an expression makes.

        Args:
            what: Names the expression, with all that it depends on.
            rank: From 1 to the number of elements.
            magnitude: From a piece of all task vectors to a float32 tensor of its length, without
                negative numbers.
        """
        counts = partial(self._counts_of, what, magnitude)
        return smallest_with(key_at(rank, torch.float32, counts), torch.float32)

    def _counts_of(
        self, what: Hashable, magnitude: Callable[[Deltas], torch.Tensor], within: int | None
    ) -> Histogram:
        return self.fact(
            ("counts", what, within),
            lambda: count_numbers(self._subtracted_P, self.source_MP, what, magnitude, within),
        )

    def gram(self) -> tuple[tuple[float, ...], ...]:
        """Return the inner products of base, first task vector, second task vector, and so on.

        In float64. Task vectors rather than parents, which hardly differ: their angles would drown
        in rounding. Without a base, the inner products of the parents themselves.
        """
        base = None if self.base_P is None else self.base
        key = ("gram", self.name, base, self.models)
        return self.cache.fact(key, lambda: sums.gram(self.base_P, self.source_MP))

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
        return self._edges(model, max(1, int(density * size)))[0]

    def thresholds(self, densities: Sequence[float]) -> tuple[float, ...]:
        """Return the `threshold` of each task vector; much faster than one by one."""
        ladder = self.fact("ladder", self._ladder)
        if ladder is None:
            return tuple(map(self.threshold, self._positions, densities))
        return ladder.at(densities)

    def _ladder(self) -> Ladder | None:
        """Return the ladder of the tensor; None where magnitudes have 32 bits, or it is empty."""
        size, dtypes = len(self._subtracted_P), list(map(self.key_dtype, self._positions))
        if size == 0 or torch.float32 in dtypes:
            return None
        return ladder_of(size, list(map(self.histogram, self._positions)), dtypes)

    def band(self, model: int, density: float, gamma: float) -> tuple[float, float]:
        """Return between which magnitudes a task vector is kept that loses its largest, too.

        The largest floor(gamma * P) elements are dropped, of the rest the largest floor(density *
        P) are kept; where so many are not left, the smallest floor(density * P) of all. What equals
        the first or the last of them is kept with it; magnitudes compare as in `threshold`.

        Args:
            model: Position of the parent.
            density: Share to keep, in [0, 1]; 1 keeps all.
            gamma: Share of the largest, in [0, 1].

        Returns:
            Float32 numbers t and u such that exactly these have `t <= |delta| < u`.
        """
        size = len(self._subtracted_P)
        count = int(density * size)
        if density >= 1 or size == 0:
            return 0.0, math.inf
        if count == 0:
            return math.inf, math.inf
        num_larger = min(int(gamma * size), size - count)
        ceiling = self._edges(model, num_larger + 1)[1] if num_larger else math.inf
        return self._edges(model, num_larger + count)[0], ceiling

    def whole_threshold(self, model: int, density: float) -> float:
        """As `threshold`, for the share of a task vector over all tensors of the merge.

        Magnitudes are compared at the precision of the checkpoints where all tensors have one
        dtype, else in float32.
        """
        if density >= 1:
            return 0.0
        if density <= 0:
            return math.inf
        size, dtype, histogram = self._for_all(model, "counts", lambda: self._count_all(model))
        if size == 0:
            return 0.0
        counts = partial(self._counts_in_all, model, histogram)
        return smallest_with(key_at(max(1, int(density * size)), dtype, counts), dtype)

    def _counts_in_all(self, model: int, of_all: Histogram, within: int | None) -> Histogram:
        if within is None:
            return of_all
        return self._for_all(model, within, lambda: self._counted(model, within))

    def _for_all(self, model: int, what: Hashable, compute: Callable[[], Fact]) -> Fact:
        if self.everything is None:
            return self.fact(("all", model, what), compute)
        return self.cache.fact(("everything", self.everything.name, model, what), compute)

    def _all(self) -> "Iterable[TensorStatistics]":
        return [self] if self.everything is None else self.everything.tensors()

    def _count_all(self, model: int) -> tuple[int, torch.dtype, Histogram]:
        parts = [
            (len(tensor.source_MP[0]), tensor.key_dtype(model), tensor.histogram(model))
            for tensor in self._all()
        ]
        size, dtypes = sum(size for size, _, _ in parts), {dtype for _, dtype, _ in parts}
        if len(dtypes) == 1:
            return size, dtypes.pop(), added(part for _, _, part in parts)
        return size, torch.float32, self._counted(model, None)

    def _counted(self, model: int, within: int | None) -> Histogram:
        return added(tensor._count(model, torch.float32, within) for tensor in self._all())

    def ranks(self, model: int) -> torch.Tensor:
        """Return the ranks of a task vector's magnitudes within its rows; see `row_ranks`.

        Magnitudes compare as in `threshold`.
        """
        key = ("ranks", self.name, self.base, self.models[model])
        return self.cache.ranks(key, lambda: self._ranks(model))

    def all_ranks(self) -> tuple[torch.Tensor, ...]:
        """Return the `ranks` of each task vector; faster than one by one."""
        key = ("ranks", self.name, self.base, self.models)
        return self.cache.ranks(key, lambda: tuple(map(self.ranks, self._positions)))

    def _ranks(self, model: int) -> torch.Tensor:
        source_P, dtype = self.source_MP[model], self.key_dtype(model)
        return delta_ranks(self._subtracted_P, source_P, dtype, self.full_shape)

    def key_dtype(self, model: int) -> torch.dtype:
        """Return the dtype in which the magnitudes of a task vector are compared."""
        same = self._subtracted_P.dtype is self.source_MP[model].dtype
        return self._subtracted_P.dtype if same else torch.float32

    def magnitudes(self, model: int) -> Iterator[torch.Tensor]:
        """Yield consecutive pieces of the magnitudes of a task vector, as new float32 tensors."""
        for [piece_P] in delta_pieces(self._subtracted_P, [self.source_MP[model]]):
            yield piece_P.abs_()

    def histogram(self, model: int, within: int | None = None) -> Histogram:
        """Return the counts of a task vector's magnitudes; see `histograms.count_keys`."""
        key = ("histogram", self.name, self.base, self.models[model], within)
        dtype = self.key_dtype(model)
        return self.cache.fact(key, lambda: self._count(model, dtype, within))

    def _count(self, model: int, dtype: torch.dtype, within: int | None) -> Histogram:
        return count_magnitudes(self._subtracted_P, self.source_MP[model], dtype, within)

    def _edges(self, model: int, rank: int) -> tuple[float, float]:
        """Return the smallest magnitude that compares equal to the rank-th largest, and larger."""
        dtype = self.key_dtype(model)
        key = key_at(rank, dtype, lambda within: self.histogram(model, within))
        return smallest_with(key, dtype), smallest_with(key + 1, dtype)

    def rescales(self, mask: Mask) -> tuple[float, ...]:
        """Return each task vector's L1 norm divided by what a mask leaves of it.

        The factor is 1 where either is below `SMALL_NORM`: there is nothing to restore. How the
        mask scales and sums is not looked at.
        """
        losing = tuple(model for model in self._positions if _drops(mask, model))
        factors = [1.0] * len(self.models)
        if not losing:
            return tuple(factors)
        kept = (
            mask.thresholds,
            mask.ceilings,
            mask.keep_levels,
            mask.rank_steps,
            mask.tie_cuts,
        )
        before = self.fact("l1", lambda: self._l1_norms(self._keeping_all(), self._positions))
        after = self.fleeting(("l1", mask.key, kept), lambda: self._l1_norms(mask, losing))
        for model, norm in zip(losing, after, strict=True):
            if min(before[model], norm) >= SMALL_NORM:
                factors[model] = before[model] / norm
        return tuple(factors)

    @property
    def _positions(self) -> tuple[int, ...]:
        return tuple(range(len(self.models)))

    def _keeping_all(self) -> Mask:
        ones, zeros = (1.0,) * len(self.models), (0.0,) * len(self.models)
        return Mask(ones, ones, zeros, (KEEP_ALL,) * len(self.models), self.mask_key)

    def _l1_norms(self, mask: Mask, models: tuple[int, ...]) -> tuple[float, ...]:
        return sums.l1_norms(mask, self._subtracted_P, self.source_MP, models)

    def tie_cuts(
        self, densities: Sequence[float], gammas: Sequence[float] | None = None
    ) -> tuple[TieCut | None, ...]:
        """Return which elements of each task vector that tie at its `threshold` are kept.

        By `threshold_ties`: where that is `index` or `hash`, down to the threshold exactly or on
        average as many elements are kept as the density says. `index` reads the tensors for it, up
        to where these elements end, once for each new density.

        Args:
            densities: Share of each that is kept, in [0, 1].
            gammas: Share of its largest that is dropped: for the lower end of `band`.

        Returns:
            As in `Mask`; None also where the elements that tie are zeros.
        """
        if self.threshold_ties == "keep":
            return ()
        shares = zip(densities, gammas or (0.0,) * len(densities), strict=True)
        cuts = tuple(self._tie_cut(i, density, gamma) for i, (density, gamma) in enumerate(shares))
        return cuts if any(cuts) else ()

    def _tie_cut(self, model: int, density: float, gamma: float) -> TieCut | None:
        size = len(self._subtracted_P)
        if size == 0 or not 0 < density < 1:
            return None
        count = max(1, int(density * size))
        rank = min(int(gamma * size), size - count) + count
        wanted, num_tied = tied_at(
            rank, self.key_dtype(model), lambda within: self.histogram(model, within)
        )
        low, above = self._edges(model, rank)
        if wanted == num_tied or low == 0:
            return None
        if self.threshold_ties == "hash":
            return TieCut(above, level=wanted * KEEP_ALL // num_tied)
        end = self.cache.norm(
            ("end of tied", self.name, self.base, self.models[model], rank),
            lambda: end_of_tied(self.magnitudes(model), low, above, wanted),
        )
        return TieCut(above, end=end)


def _drops(mask: Mask, model: int) -> bool:
    """Whether any element of a model may be dropped."""
    kept_whole = mask.thresholds[model] == 0 and mask.keep_levels[model] == KEEP_ALL
    return not (kept_whole and mask.ceiling(model) == math.inf)
