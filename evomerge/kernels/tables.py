"""Tables: what a kernel is to do with one tensor; a few numbers, or an expression of a method."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from evomerge.kernels.masks import GROUP, KEEP_ALL, MaskKey


@dataclass(frozen=True)
class Span:
    """A weighted sum: `base * base_P + sum_i coefficients[i] * y_i`.

    Attributes:
        coefficients: One per source, in recipe order.
        base: Coefficient of the base; not read where no base takes part.
        deltas: Whether y_i is the i-th source's task vector (source - base) or the source itself.
    """

    coefficients: tuple[float, ...]
    base: float = 0.0
    deltas: bool = False


@dataclass(frozen=True)
class TieCut:
    """Which of the elements that tie at a threshold are kept.

    Attributes:
        above: Float32 number; elements from the threshold up to below this one tie.
        end: Those whose index in the tensor is below this one may be kept; 2**63 - 1 is all.
        level: Of those, the ones whose random number is below this level are kept; in [0, 2**32].
    """

    above: float
    end: int = 2**63 - 1
    level: int = KEEP_ALL


@dataclass(frozen=True)
class Mask:
    """Task vectors with elements dropped, summed and added to the base.

    An element of the i-th task vector is kept where its magnitude is at least `thresholds[i]` and
    below `ceilings[i]`, its random number is below `keep_levels[i]`, to which its rank adds
    `rank_steps[i]` times itself, and `tie_cuts[i]` does not drop it. Without `elect` the result is
    `base + lam * sum_i scales[i] * kept_i`. With `elect`, each element takes the sum of its
    positive or of its negative terms, whichever is larger in magnitude, plus if they cancel;
    `normalize` divides it by the summed weights of the models in it, a sum of 0 counting as 1.

    Attributes:
        scales: Factor of each task vector: its weight times whatever restores its norm.
        weights: What each model counts in the division; only read with `normalize`.
        thresholds: Float32 numbers; 0 keeps all, infinity none.
        keep_levels: In [0, 2**32]; 2**32 keeps all, 0 none.
        key: What random numbers are drawn for, where there are levels between those ends.
        elect: Whether each element's sign is elected.
        normalize: Whether the elected sum is divided; needs `elect`.
        lam: Scale of the merged task vector.
        ceilings: Float32 numbers; infinity keeps all. Empty where no model has one.
        rank_steps: What each rank adds to the keep level, 0 nothing. Empty where none count.
        ranks: Each element's rank, flat uint8 tensors; not read where the step is 0.
        tie_cuts: What becomes of elements at the threshold; None keeps them. Empty where all are.
    """

    scales: tuple[float, ...]
    weights: tuple[float, ...]
    thresholds: tuple[float, ...]
    keep_levels: tuple[int, ...]
    key: MaskKey
    elect: bool = False
    normalize: bool = False
    lam: float = 1.0
    ceilings: tuple[float, ...] = ()
    rank_steps: tuple[int, ...] = ()
    ranks: tuple[torch.Tensor | None, ...] = field(default=(), compare=False)
    tie_cuts: tuple[TieCut | None, ...] = ()

    def draws(self, group: int) -> bool:
        """Whether any source of a group (see `masks.random_words`) needs random numbers."""
        models = slice(GROUP * group, GROUP * (group + 1))
        cuts = [cut.level for cut in self.tie_cuts[models] if cut]
        return any(0 < level < KEEP_ALL for level in (*self.keep_levels[models], *cuts))

    def tie_cut(self, model: int) -> TieCut | None:
        """Return what becomes of a model's elements at its threshold; None keeps them."""
        return self.tie_cuts[model] if self.tie_cuts else None

    def ceiling(self, model: int) -> float:
        """Return the magnitude from which on a model's elements are dropped."""
        return self.ceilings[model] if self.ceilings else math.inf

    def level(self, model: int, first: int, count: int) -> int | torch.Tensor:
        """Return the level below which random numbers keep, for consecutive elements of a model.

        One number, or an int64 tensor of `count` where ranks matter.
        """
        rank_P = self.ranks[model] if self.rank_steps and self.rank_steps[model] else None
        if rank_P is None:
            return self.keep_levels[model]
        ranks = rank_P[first : first + count].long()
        return ranks.mul_(self.rank_steps[model]).add_(self.keep_levels[model])


Expression = Callable[[torch.Tensor | None, Sequence[torch.Tensor]], torch.Tensor]
"""From the base (None where no base takes part) and the M sources, all float32 and of one shape, to
a new float32 tensor of that shape. Writes to none of them. A function of a module, with its numbers
bound by `functools.partial`."""


@dataclass(frozen=True)
class Fused:
    """An expression by its name, for implementations that have one of their own for it.

    Attributes:
        name: Of the expression.
        per_model: Numbers of each model: one tuple, with one number per source, for each kind.
        shared: The other numbers.
    """

    name: str
    per_model: tuple[tuple[float, ...], ...] = ()
    shared: tuple[float, ...] = ()


@dataclass(frozen=True)
class Local:
    """A merge element by element, by an expression that is neither a `Span` nor a `Mask`.

    Attributes:
        run: Gets the same run of elements of every model; which run makes no difference.
        fused: The same as data; None where only `run` can do it.
    """

    run: Expression
    fused: Fused | None = None


@dataclass(frozen=True)
class Whole:
    """A merge that needs its tensor whole and in its shape: rows, matrix products, transforms.

    Attributes:
        run: Gets whole tensors.
        shape: Their shape.
    """

    run: Expression
    shape: tuple[int, ...]


KernelTable = Span | Mask | Local | Whole
"""What `reference.carry_out` carries out."""
