"""MultiSLERP: a weighted mean of models, or of their task vectors, on a sphere.

Goddard 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea. The models' directions are
averaged in the plane that touches the sphere at their mean, and the result gets the mean of their
norms. Kernel: span; every vector on the way is a sum of the models, so that inner products suffice.
Letters: M models.
"""

import dataclasses

import numpy as np

from evomerge.config.params import Param
from evomerge.errors import MergeError
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Span
from evomerge.methods.method import WEIGHT, Method, Values
from evomerge.methods.slerp import is_single


def table(values: Values, statistics: TensorStatistics) -> Span:
    """Return each model's coefficient, from the Gram matrix."""
    weight_M = np.array(values.per_model["weight"])
    if len(weight_M) == 1:
        return Span((1.0,))
    if values.shared["normalize_weights"]:
        weight_M = weight_M / weight_M.sum()
    with_base = statistics.base_P is not None
    gram_MM = np.array(statistics.gram())[with_base:, with_base:]
    coefficient_M = _coefficients(gram_MM, weight_M, float(values.shared["eps"]), statistics)
    return Span(tuple(map(float, coefficient_M)), base=1.0, deltas=with_base)


def _coefficients(
    gram_MM: np.ndarray, weight_M: np.ndarray, eps: float, statistics: TensorStatistics
) -> np.ndarray:
    norm_M = np.sqrt(gram_MM.diagonal())
    scale_M = 1.0 / (norm_M + eps)
    unit_MM = gram_MM * np.outer(scale_M, scale_M)
    # mean and tangent as coefficients of the units
    mean_norm = float(np.sqrt(max(0.0, weight_M @ unit_MM @ weight_M)))
    if mean_norm < eps:
        if not norm_M.any() or is_single(statistics):
            return weight_M
        raise MergeError(
            f"{statistics.name}: the weighted directions of {', '.join(statistics.models)} add up "
            f"to nothing (norm {mean_norm:.3g}, at least eps {eps:g} is needed), so they have no "
            "mean on the sphere. Change the weights, or merge this tensor by linear."
        )
    mean_M = weight_M / mean_norm
    tangent_M = weight_M - (weight_M @ unit_MM @ mean_M) * mean_M
    tangent_norm = float(np.sqrt(max(0.0, tangent_M @ unit_MM @ tangent_M))) + eps
    result_M = np.cos(tangent_norm) * mean_M + np.sin(tangent_norm) / tangent_norm * tangent_M
    return result_M * scale_M * (weight_M @ norm_M)


def weights_cancel(values: Values) -> str | None:
    """Refuse weights that cannot be brought to a sum of 1."""
    weights = values.per_model["weight"]
    if values.shared["normalize_weights"] and len(weights) > 1 and abs(sum(weights)) < 1e-8:
        return f"the weights {weights} add up to 0. Change them, or set normalize_weights: false."
    return None


METHOD = Method(
    name="multislerp",
    summary="weighted mean of models or task vectors on a sphere",
    source="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    params=(
        dataclasses.replace(WEIGHT, meaning="share of this model in the mean"),
        Param(
            "normalize_weights",
            "divide the weights by their sum",
            default=True,
            per_model=False,
            kind="bool",
        ),
        Param(
            "eps",
            "norm below which a direction counts as none",
            default=1e-8,
            per_model=False,
            low=1e-12,
            high=1.0,
        ),
    ),
    table=table,
    base="optional",
    refuse=weights_cancel,
)
