"""Karcher mean: the point on a sphere nearest to the directions of all models, at their mean norm.

Karcher 1977, https://doi.org/10.1002/cpa.3160300502, found by steps along the mean of the arcs to
all models. A base model is one more model. Kernel: span; every vector on the way is a sum of the
models, so that inner products suffice. Letters: M models.
"""

import numpy as np

from evomerge.config.params import Param
from evomerge.errors import MergeError
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Span
from evomerge.methods.method import Method, Values
from evomerge.methods.slerp import is_single

OPPOSITE = -1.0 + 1e-12
"""Cosine up to which the arc to a model has no direction: half a millionth from opposite."""


def table(values: Values, statistics: TensorStatistics) -> Span:
    """Return each model's coefficient, from the Gram matrix."""
    gram_MM = np.array(statistics.gram())
    num_models = len(gram_MM)
    if num_models == 1 or is_single(statistics):
        return Span((1.0 / num_models,) * num_models)
    norm_M = np.sqrt(gram_MM.diagonal())
    tol = float(values.shared["tol"])
    some_M = np.flatnonzero(norm_M > tol)
    coefficient_M = np.zeros(num_models)
    if len(some_M):
        unit_MM = gram_MM[np.ix_(some_M, some_M)] / np.outer(norm_M[some_M], norm_M[some_M])
        names = [f"{statistics.name}: {statistics.models[i]}" for i in some_M]
        mean_M = _mean(unit_MM, int(values.shared["max_iter"]), tol, names)
        coefficient_M[some_M] = mean_M / norm_M[some_M] * norm_M.mean()
    return Span(tuple(map(float, coefficient_M)))


def _mean(unit_MM: np.ndarray, max_iter: int, tol: float, names: list[str]) -> np.ndarray:
    """Return the mean direction as coefficients of unit vectors, given their inner products."""
    share = 1.0 / len(unit_MM)
    mean_M = np.full(len(unit_MM), share)
    length = _norm(mean_M, unit_MM)
    mean_M = np.eye(len(unit_MM))[0] if length < tol else mean_M / length
    for _ in range(max_iter):
        tangent_M = share * _arcs(mean_M, unit_MM, tol, names).sum(0)
        length = _norm(tangent_M, unit_MM)
        if length < tol:
            break
        mean_M = np.cos(length) * mean_M + np.sin(length) / length * tangent_M
        mean_M /= _norm(mean_M, unit_MM)
    return mean_M


def _arcs(mean_M: np.ndarray, unit_MM: np.ndarray, tol: float, names: list[str]) -> np.ndarray:
    """Return the tangents at the mean that lead to each unit vector, one row for each."""
    cosine_M = np.clip(unit_MM @ mean_M, -1.0, 1.0)
    if cosine_M.min() < OPPOSITE:
        raise MergeError(
            f"{names[int(cosine_M.argmin())]} points opposite to the mean of all models (cosine "
            f"{cosine_M.min():.6f}), so no arc to it is shorter than the others. Merge this tensor "
            "by linear, or leave the model out."
        )
    angle_M = np.arccos(cosine_M)
    far_M = angle_M >= tol
    stretch_M = np.where(far_M, angle_M / np.where(far_M, np.sin(angle_M), 1.0), 0.0)
    return stretch_M[:, None] * (np.eye(len(unit_MM)) - cosine_M[:, None] * mean_M)


def _norm(vector_M: np.ndarray, unit_MM: np.ndarray) -> float:
    return float(np.sqrt(max(0.0, vector_M @ unit_MM @ vector_M)))


METHOD = Method(
    name="karcher",
    summary="mean of the models on a sphere, by steps along arcs",
    source="https://arxiv.org/abs/2603.04972",
    params=(
        Param("max_iter", "most steps", 10.0, per_model=False, kind="int", low=1.0),
        Param("tol", "length of a step or arc that ends it", 1e-5, per_model=False, low=1e-12),
    ),
    table=table,
    base="input",
)
