"""SLERP: from the base to one other model along the arc between them, to position `t`.

Shoemake 1985, https://doi.org/10.1145/325165.325242. The angle is that between the two whole
tensors; the tensors themselves are summed, not their directions, and the norm of the result is left
as it comes. Kernel: span over base and model.
"""

import math

from evomerge.config.params import Param
from evomerge.errors import MergeError
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Span
from evomerge.methods.method import Method, Values

PARALLEL = 0.9995
"""Cosine above which the arc is so short that the straight line is taken."""

OPPOSITE = -0.9995
"""Cosine below which there are arcs to every side, none of them shorter than the others."""

NO_DIRECTION = 1e-8
"""Norm up to which a tensor has no direction, so that the straight line is taken."""


def table(values: Values, statistics: TensorStatistics) -> Span:
    """Return the coefficients of base and model at `t`, by the angle from the Gram matrix."""
    t = float(values.shared["t"])
    (base_base, base_delta), (_, delta_delta) = statistics.gram()
    model_model = max(0.0, base_base + 2.0 * base_delta + delta_delta)
    norms = math.sqrt(base_base), math.sqrt(model_model)
    if min(norms) <= NO_DIRECTION or t in (0.0, 1.0):
        return Span((t,), base=1.0 - t)
    cosine = (base_base + base_delta) / (norms[0] * norms[1])
    if cosine > PARALLEL or is_single(statistics):
        return Span((t,), base=1.0 - t)
    refuse_opposite(cosine, statistics, (str(statistics.base), *statistics.models))
    of_base, of_model = arc(t, cosine)
    return Span((of_model,), base=of_base)


def arc(t: float, cosine: float) -> tuple[float, float]:
    """Return the coefficients of both ends of an arc at position `t`."""
    angle = math.acos(min(1.0, cosine))
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def is_single(statistics: TensorStatistics) -> bool:
    """Whether the tensor is one number, which may change its sign but does not turn."""
    return len(statistics.source_MP[0]) == 1


def refuse_opposite(cosine: float, statistics: TensorStatistics, models: tuple[str, ...]) -> None:
    """Refuse two tensors that all but point in opposite directions.

    Raises:
        MergeError: Names the tensor, both models, and the cosine between them.
    """
    if cosine < OPPOSITE:
        raise MergeError(
            f"{statistics.name}: {models[0]} and {models[1]} point in opposite directions (cosine "
            f"{cosine:.6f}, at least {OPPOSITE} is allowed), so no arc between them is shorter "
            "than the others. Take one of them whole here, by a rule with a filter, use linear, or "
            "leave one of the models out."
        )


METHOD = Method(
    name="slerp",
    summary="along the arc from the base to one other model",
    source="https://doi.org/10.1145/325165.325242",
    params=(
        Param(
            name="t",
            meaning="position on the path from the base (0) to the other model (1)",
            default=None,
            per_model=False,
            low=0.0,
            high=1.0,
            search=(0.0, 1.0),
        ),
    ),
    table=table,
    base="required",
    max_parents=1,
)
