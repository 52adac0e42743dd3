"""Effects of the methods that drop elements of task vectors: TIES, breadcrumbs, DARE, DELLA."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

from evomerge.methods.effect import Effect, Inputs, alone, rounded
from evomerge.methods.method import Values, shares

MANY = 10**6
"""Elements from which on two densities never keep equally many: they differ by 1e-6 or more."""


class _Kept(NamedTuple):
    """Which elements of a task vector are kept."""

    how: Hashable
    numbers: tuple[float, ...]


_ALL, _NONE = _Kept("all", ()), _Kept("none", ())


def largest(values: Values, inputs: Inputs, ideal: bool) -> list[_Kept]:
    """Return what TIES keeps of each task vector."""
    densities, size = values.per_model["density"], inputs.size
    if values.shared["trim_whole_model"]:
        return [_share("largest of the model", density) for density in densities]
    hows = _with_ties("largest", inputs)
    if ideal or size >= MANY:
        return [_share(how, density) for how, density in zip(hows, densities, strict=True)]
    return [
        _share(how, density, max(1, int(density * size)))
        for how, density in zip(hows, densities, strict=True)
    ]


def band(values: Values, inputs: Inputs, ideal: bool) -> list[_Kept]:
    """Return what breadcrumbs keep of each task vector."""
    pairs, size = (
        zip(values.per_model["density"], values.per_model["gamma"], strict=True),
        inputs.size,
    )
    found = []
    for how, (density, gamma) in zip(_with_ties("band", inputs), pairs, strict=True):
        count = int(density * size)
        if ideal or size >= MANY:
            found.append(_share(how, density, density, gamma))
        elif count == 0:
            found.append(_NONE)
        else:
            found.append(_share(how, density, count, min(int(gamma * size), size - count)))
    return found


def drawn(values: Values, inputs: Inputs, ideal: bool) -> list[_Kept]:
    """Return what DARE and DELLA keep; random numbers follow the place among the parents."""
    densities = values.per_model["density"]
    epsilons = values.per_model.get("epsilon", (0.0,) * len(densities))
    return [
        _share(("drawn", inputs.mask_seed, model), density, density, epsilon)
        for model, (density, epsilon) in enumerate(zip(densities, epsilons, strict=True))
    ]


def _share(how: Hashable, density: float, *numbers: float) -> _Kept:
    if 0 < density < 1:
        return _Kept(how, numbers or (density,))
    return _ALL if density else _NONE


def _with_ties(how: str, inputs: Inputs) -> list[Hashable]:
    """Return what is kept of each parent, with what becomes of elements that tie."""
    if inputs.threshold_ties == "hash":
        return [(how, "hash", inputs.mask_seed, model) for model in range(len(inputs.parents))]
    return [(how, inputs.threshold_ties)] * len(inputs.parents)


Keep = Callable[[Values, Inputs, bool], list[_Kept]]
"""Says which elements of each task vector a method keeps."""


class _Term(NamedTuple):
    """What a task vector adds.

    Attributes:
        kind: Its parent, what is kept of it, and how that is scaled up again.
        scale: Its factor.
        numbers: The others.
    """

    kind: tuple[str, Hashable, str]
    scale: float
    numbers: tuple[float, ...]


def masked(values: Values, inputs: Inputs, ideal: bool, keep: Keep, elect: bool) -> Effect:
    """Return the effect of a method that drops elements of task vectors.

    Args:
        values: Of the parameters.
        inputs: What is merged.
        ideal: Whether in exact arithmetic, or as carried out.
        keep: What is kept.
        elect: Whether signs are elected; else a weighted sum.
    """
    terms = _terms(values, inputs, ideal, keep, elect)
    (lam,) = rounded([values.shared["lambda"]], ideal) if elect else (1.0,)
    if not terms or not lam:
        return alone(inputs.base)
    kinds, scales = tuple([term.kind for term in terms]), [term.scale for term in terms]
    numbers = [number for term in terms for number in term.numbers]
    if elect:
        normalize = bool(values.shared["normalize"])
        if normalize and ideal:
            # common factors divide out
            total = sum(map(abs, scales))
            scales = [scale / total for scale in scales]
        return Effect(("elected", normalize, inputs.base, kinds), (lam, *scales, *numbers))
    if all(how == _ALL.how for _, how, _ in kinds):
        parents = tuple([parent for parent, _, _ in kinds])
        return Effect(("task vectors", inputs.base, parents), tuple(scales))
    return Effect(("summed", inputs.base, kinds), (*scales, *numbers))


def _terms(values: Values, inputs: Inputs, ideal: bool, keep: Keep, elect: bool) -> list[_Term]:
    """Return what each task vector adds, of those that add something."""
    scales = values.per_model["weight"] if elect else shares(values)
    restored = ""
    if values.shared["rescale"]:
        restored = "by density" if values.shared.get("rescale_by_density") else "by norm"
    found = []
    for parent, kept, scale, short in zip(
        inputs.parents, keep(values, inputs, ideal), scales, rounded(scales, ideal), strict=True
    ):
        if kept is _NONE or parent == inputs.base or not scale:
            continue
        if kept is _ALL or not restored:
            found.append(_Term((parent, kept.how, ""), short, kept.numbers))
        else:
            # what makes up for the loss is multiplied in before the product is rounded
            found.append(_Term((parent, kept.how, restored), scale, kept.numbers))
    return found
