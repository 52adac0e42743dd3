"""Method: a row of the table of merge methods; and the parameters that several methods share."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from evomerge.config.params import Param
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import KernelTable, Mask

Made = TypeVar("Made")


@dataclass(frozen=True)
class Values:
    """The values that a method's parameters take for one tensor, or for many that take the same.

    Attributes:
        per_model: Name to one value per parent, in recipe order.
        shared: Name to value.
    """

    per_model: Mapping[str, tuple[float, ...]]
    shared: Mapping[str, float | bool]
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, make: "Callable[[Values], Made]") -> Made:
        """Return what a function makes of these values alone, made for the first tensor only."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]


def nothing_wrong(values: Values) -> str | None:
    """Accept any values; the default of `Method.refuse`."""
    return None


Base = Literal["required", "optional", "input", "listed"]
"""What a method makes of `base_model`:

- `required`: the task vectors start there; it is no parent.
- `optional`: the same where a recipe gives one; without, the models themselves are merged.
- `input`: one more model to merge, first, where the recipe does not list it.
- `listed`: one of the listed models; it only gives config and tokenizer.
"""


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        name: As written in recipes; mergekit's name where mergekit has the method.
        summary: One phrase for the documentation.
        source: Link to the paper or definition.
        params: The method's parameters.
        table: Turns the values for one tensor into what a kernel carries out. May ask for facts
            that hold for every candidate; reads and draws nothing else.
        base: What the recipe's base model is to the method; see `Base`.
        min_parents: Fewest parents.
        max_parents: Most parents; None is any number.
        random_masks: Whether masks are drawn, so that the recipe's `mask_seed` matters.
        has_threshold: Whether elements are kept down to a magnitude at which some may tie, so that
            the recipe's `threshold_ties` matters.
        refuse: Says what is wrong with values that are legal one by one but together are no merge;
            None where nothing is.
    """

    name: str
    summary: str
    source: str
    params: tuple[Param, ...]
    table: Callable[[Values, TensorStatistics], KernelTable]
    base: Base
    min_parents: int = 1
    max_parents: int | None = None
    random_masks: bool = False
    has_threshold: bool = False
    refuse: Callable[[Values], str | None] = nothing_wrong

    @property
    def needs_base(self) -> bool:
        """Whether there is no merge without a base."""
        return self.base == "required"

    def has_deltas(self, base_given: bool) -> bool:
        """Whether a base, where one is given, is what task vectors start from, and no parent."""
        return self.needs_base or (self.base == "optional" and base_given)


WEIGHT = Param(
    name="weight",
    meaning="coefficient of this model's task vector",
    default=None,
    per_model=True,
    search=(0.0, 1.0),
)
DENSITY = Param(
    name="density",
    meaning="share of this model's task vector that is kept",
    default=1.0,
    per_model=True,
    low=0.0,
    high=1.0,
    search=(0.1, 1.0),
)
LAMBDA = Param(
    name="lambda",
    meaning="scale of the merged task vector",
    default=1.0,
    per_model=False,
    search=(0.5, 1.5),
)
INT8_MASK = Param(
    name="int8_mask",
    meaning="accepted because mergekit files often set it; has no effect on the numbers",
    default=False,
    per_model=False,
    kind="bool",
)


def normalize(default: bool) -> Param:
    """Return the switch `normalize` with a method's own default."""
    meaning = "divide by the sum of the weights that took part"
    return Param("normalize", meaning, default=default, per_model=False, kind="bool")


def rescale(default: bool) -> Param:
    """Return the switch `rescale` with a method's own default."""
    meaning = "scale the kept elements so that each task vector keeps its L1 norm in every tensor"
    return Param("rescale", meaning, default=default, per_model=False, kind="bool")


def divisor(values: Values) -> float:
    """Return the sum of the weights where `normalize` asks for it, else 1.

    Weights that add up to less than 1e-8 count as 1.
    """
    total = sum(values.per_model["weight"])
    return total if values.shared["normalize"] and abs(total) >= 1e-8 else 1.0


def finished(
    kept: Mask,
    values: Values,
    statistics: TensorStatistics,
    elect: bool,
    factors: tuple[float, ...] | None = None,
) -> Mask:
    """Return the mask of a method that drops elements, from one that only says which.

    Args:
        kept: What is kept.
        values: Weights, `lambda`, `normalize` and, without factors, `rescale`.
        statistics: Facts on the tensor.
        elect: Whether signs are elected (Yadav 2023); else a weighted sum.
        factors: What each task vector is multiplied by to make up for what it lost; None is what
            gives back its L1 norm where `rescale` is set, and 1 elsewhere.
    """
    if factors is None and values.shared["rescale"]:
        factors = statistics.rescales(kept)
    scales = values.per_model["weight"] if elect else values.once(shares)
    if factors is not None:
        scales = tuple([scale * factor for scale, factor in zip(scales, factors, strict=True)])
    changes: dict[str, Any] = {"scales": scales}
    if elect:
        normalize, lam = bool(values.shared["normalize"]), values.shared["lambda"]
        changes |= {"elect": True, "normalize": normalize, "lam": lam}
    # as dataclasses.replace, which takes thrice as long
    return Mask(**(vars(kept) | changes))


def shares(values: Values) -> tuple[float, ...]:
    """Return lambda times each weight, divided by their sum where `normalize` is set."""
    total, lam = divisor(values), values.shared["lambda"]
    return tuple(lam * weight / total for weight in values.per_model["weight"])
