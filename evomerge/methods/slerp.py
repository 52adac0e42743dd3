"""SLERP: from the base to one other model along the arc between them, to position `t`.

Shoemake 1985, https://doi.org/10.1145/325165.325242. The angle is that between the two whole
tensors; the tensors themselves are summed, not their directions, and the norm of the result is left
as it comes. Kernel: span over base and model.
"""

import math

from evomerge.config.params import Param
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Span
from evomerge.methods.method import Method, Values

PARALLEL = 0.9995
"""Cosine of either sign above which the straight line is taken: the arc is too short, or vague."""

NO_DIRECTION = 1e-8
"""Norm up to which a tensor has no direction, so that the straight line is taken."""


def table(values: Values, statistics: TensorStatistics) -> Span:
    """Return the coefficients of base and model at `t`, by the angle from the Gram matrix."""
    t = float(values.shared["t"])
    (base_base, base_delta), (_, delta_delta) = statistics.gram()
    model_model = max(0.0, base_base + 2.0 * base_delta + delta_delta)
    norms = math.sqrt(base_base), math.sqrt(model_model)
    if min(norms) <= NO_DIRECTION:
        return Span((t,), base=1.0 - t)
    cosine = (base_base + base_delta) / (norms[0] * norms[1])
    if abs(cosine) > PARALLEL:
        return Span((t,), base=1.0 - t)
    angle = math.acos(cosine)
    of_base, of_model = (math.sin(share * angle) / math.sin(angle) for share in (1.0 - t, t))
    return Span((of_model,), base=of_base)


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
