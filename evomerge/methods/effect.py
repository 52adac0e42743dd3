"""Effect: what a method's values come to for a tensor, and what sums of tensors come to."""

import math
from array import array
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from evomerge.config.recipe import ThresholdTies


class Inputs(NamedTuple):
    """What of a tensor, besides the values, its merge depends on.

    Attributes:
        base: Which tensor task vectors start from; None where none are made.
        parents: Which tensors are merged. What is equal is the same to the last bit.
        shape: Their shape, as far as the method looks at it; see `effects.shape_seen`.
        mask_seed, threshold_ties: As in the recipe.
    """

    base: str | None
    parents: tuple[str, ...]
    shape: tuple[int, ...]
    mask_seed: int = 0
    threshold_ties: ThresholdTies = "keep"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Effect(NamedTuple):
    """What values come to.

    Attributes:
        kind: All that is no number, inputs that count among it.
        numbers: The numbers.
    """

    kind: tuple[Hashable, ...]
    numbers: tuple[float, ...]


def rounded(numbers: Sequence[float], ideal: bool) -> list[float]:
    """Return numbers as the kernels read them: rounded to float32."""
    found = list(numbers) if ideal else array("f", numbers).tolist()
    return [number + 0.0 for number in found]


def alone(tensor: str | None) -> Effect:
    """Return the effect of a merge that is one of its tensors, mostly the base."""
    assert tensor is not None, "task vectors start at a base"
    return Effect(("sum", (tensor,)), (1.0,))


def sum_of(tensors: Sequence[str], coefficients: Sequence[float], ideal: bool) -> Effect:
    """Return a weighted sum of tensors."""
    live = [
        (tensor, number)
        for tensor, number in zip(tensors, rounded(coefficients, ideal), strict=True)
        if number
    ]
    if not live:
        # zeros of either sign
        return Effect(("zeros", tuple(tensors), str(list(coefficients))), ())
    return Effect(("sum", tuple([tensor for tensor, _ in live])), tuple([n for _, n in live]))


def base_plus(kind: str, inputs: Inputs, coefficients: Sequence[float], ideal: bool) -> Effect:
    """Return the base plus a weighted sum of task vectors, or of something made of each of them.

    A parent that is the base has none.
    """
    live = [
        (parent, number)
        for parent, number in zip(inputs.parents, rounded(coefficients, ideal), strict=True)
        if number and parent != inputs.base
    ]
    if not live:
        return alone(inputs.base)
    return Effect(
        (kind, inputs.base, tuple([parent for parent, _ in live])), tuple([n for _, n in live])
    )
