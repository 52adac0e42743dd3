"""Effects: what a method's values come to for a tensor; equal effects are equal merges.

A parent of weight 0 adds nothing, whatever its other values are; at density 1 no mask is drawn; a
sum of weights divides out. An effect keeps what is left, so it may be equal where values differ,
and where methods do: a path that ends at a parent is that parent.

As carried out, an effect holds each number as the kernels read it: coefficients in float32, a
density as the number of elements that it keeps. Equal effects then are equal tables of the kernels
but for terms that add 0, so that every element comes out as the same number; only the sign of a
zero may differ, where a model holds a negative zero. Nothing is equal here that is so in exact
arithmetic alone: weights that are divided by their sum after the task vectors were multiplied by
them (TIES) leave their rounding behind.

An ideal effect is the one in exact arithmetic, with continuous numbers: what a value does at all.

A method that is not listed has its values as they are for its effect.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from evomerge.methods.effect import Effect, Inputs, alone, base_plus, rounded, sum_of
from evomerge.methods.masked_effects import MANY, band, drawn, largest, masked
from evomerge.methods.method import INT8_MASK, Method, Values, divisor, shares


def shape_seen(method: Method, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return what of a shape may matter to an effect of a method: all, the size, or nothing."""
    if method.name in ("tsv", "iso_c"):
        return shape
    counts = method.has_threshold or method.name == "pcb"
    return (min(math.prod(shape), MANY),) if counts else ()


def effect_of(method: Method, values: Values, inputs: Inputs, *, ideal: bool = False) -> Effect:
    """Return what values come to.

    Args:
        method: The method.
        values: Of its parameters.
        inputs: What is merged.
        ideal: Whether in exact arithmetic, or as carried out.
    """
    find = _EFFECTS.get(method.name)
    return _as_given(method, values, inputs) if find is None else find(values, inputs, ideal)


def _as_given(method: Method, values: Values, inputs: Inputs) -> Effect:
    """Return the values as they are."""
    own = [number for name, each in values.per_model.items() for number in each]
    shared = [float(value) for name, value in values.shared.items() if name != INT8_MASK.name]
    settings = (
        inputs.mask_seed if method.random_masks else None,
        inputs.threshold_ties if method.has_threshold else None,
    )
    kind = (method.name, inputs.base, inputs.parents, *settings)
    # + 0.0 turns -0.0 into 0.0
    return Effect(kind, tuple([number + 0.0 for number in (*own, *shared)]))


def _linear(values: Values, inputs: Inputs, ideal: bool) -> Effect:
    total = divisor(values)
    return sum_of(inputs.parents, [w / total for w in values.per_model["weight"]], ideal)


def _passthrough(values: Values, inputs: Inputs, ideal: bool) -> Effect:
    return sum_of(inputs.parents, values.per_model["scale"], ideal)


def _task_arithmetic(values: Values, inputs: Inputs, ideal: bool) -> Effect:
    return base_plus("task vectors", inputs, shares(values), ideal)


def _slerp(values: Values, inputs: Inputs, ideal: bool) -> Effect:
    t = float(values.shared["t"])
    assert inputs.base is not None, "slerp starts at the base"
    if t in (0.0, 1.0):
        return sum_of((*inputs.parents, inputs.base), (t, 1.0 - t), ideal)
    return Effect(("slerp", inputs.base, inputs.parents), (t,))


def _nuslerp(values: Values, inputs: Inputs, ideal: bool) -> Effect:
    first, second = values.per_model["weight"]
    t = second / (first + second)
    flat = bool(values.shared["nuslerp_flatten"])
    if flat and t in (0.0, 1.0):
        if inputs.base is None:
            return sum_of(inputs.parents, (1.0 - t, t), ideal)
        return base_plus("task vectors", inputs, (1.0 - t, t), ideal)
    along = None if flat else bool(values.shared["nuslerp_row_wise"])
    return Effect(("nuslerp", along, inputs.base, inputs.parents), (t + 0.0,))


def _multislerp(values: Values, inputs: Inputs, ideal: bool) -> Effect:
    weight_M = np.array(values.per_model["weight"])
    if len(weight_M) == 1:
        return sum_of(inputs.parents, (1.0,), ideal)
    if values.shared["normalize_weights"]:
        weight_M = weight_M / weight_M.sum()
    kind = ("multislerp", inputs.base, inputs.parents)
    return Effect(kind, (*(weight_M + 0.0).tolist(), float(values.shared["eps"])))


def _karcher(values: Values, inputs: Inputs, ideal: bool) -> Effect:
    if len(inputs.parents) == 1:
        return sum_of(inputs.parents, (1.0,), ideal)
    steps, tol = float(values.shared["max_iter"]), float(values.shared["tol"])
    return Effect(("karcher", inputs.parents), (steps, tol))


def _nearswap(values: Values, inputs: Inputs, ideal: bool) -> Effect:
    (t,) = rounded([values.shared["t"]], ideal)
    return Effect(("nearswap", inputs.base, inputs.parents), (t,)) if t else alone(inputs.base)


def _fourier(values: Values, inputs: Inputs, ideal: bool) -> Effect:
    lam, cutoff = values.shared["lambda"], float(values.shared["cutoff"])
    scales = [lam * weight for weight in values.per_model["weight"]]
    effect = base_plus(f"high pass, norm kept: {values.shared['keep_norm']}", inputs, scales, ideal)
    is_base = effect == alone(inputs.base)
    return effect if is_base else effect._replace(numbers=(*effect.numbers, cutoff + 0.0))


def _tsv(values: Values, inputs: Inputs, ideal: bool) -> Effect:
    share = float(values.shared["rank_share"]) or 1.0 / len(inputs.parents)
    if len(inputs.shape) == 2 and not ideal:
        share = max(1, int(share * min(inputs.shape)))
    return _direction("tsv", (share,), values, inputs, ideal)


def _iso_c(values: Values, inputs: Inputs, ideal: bool) -> Effect:
    return _direction("iso_c", (), values, inputs, ideal)


def _direction(
    name: str, variant: tuple[float, ...], values: Values, inputs: Inputs, ideal: bool
) -> Effect:
    """Return the effect of a method that goes along one direction; see `methods.direction`."""
    lam, num_models = values.shared["lambda"], len(inputs.parents)
    if len(inputs.shape) != 2:
        return base_plus("task vectors", inputs, (lam / num_models,) * num_models, ideal)
    (scale,) = rounded([lam], ideal)
    if not scale:
        return alone(inputs.base)
    return Effect((name, inputs.base, inputs.parents), (scale, *variant))


def _consensus(values: Values, inputs: Inputs, ideal: bool) -> Effect:
    lam = values.shared["lambda"]
    weights = rounded([lam * weight for weight in values.per_model["weight"]], ideal)
    if not any(weights):
        return alone(inputs.base)
    factors = rounded(values.per_model["lambda_mask"], ideal)
    kind = ("consensus", int(values.shared["min_tasks"]), inputs.base, inputs.parents)
    return Effect(kind, (*weights, *factors))


def _pcb(values: Values, inputs: Inputs, ideal: bool) -> Effect:
    # scores are float64, and so are the weights they are multiplied by
    weights = [values.shared["lambda"] * weight + 0.0 for weight in values.per_model["weight"]]
    if not any(weights):
        return alone(inputs.base)
    kept = float(values.shared["density"])
    if 0 < kept < 1 and not ideal and inputs.size < MANY:
        kept = max(1, int(kept * inputs.size)) / inputs.size
    return Effect(("pcb", inputs.base, inputs.parents), (*weights, kept))


_EFFECTS: dict[str, Callable[[Values, Inputs, bool], Effect]] = {
    "linear": _linear,
    "passthrough": _passthrough,
    "task_arithmetic": _task_arithmetic,
    "ties": partial(masked, keep=largest, elect=True),
    "breadcrumbs": partial(masked, keep=band, elect=False),
    "breadcrumbs_ties": partial(masked, keep=band, elect=True),
    "dare_linear": partial(masked, keep=drawn, elect=False),
    "dare_ties": partial(masked, keep=drawn, elect=True),
    "della_linear": partial(masked, keep=drawn, elect=False),
    "della": partial(masked, keep=drawn, elect=True),
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "nearswap": _nearswap,
    "fourier": _fourier,
    "tsv": _tsv,
    "iso_c": _iso_c,
    "consensus": _consensus,
    "pcb": _pcb,
}
