"""TIES: trim task vectors to their largest elements, elect a sign, average those that agree.

Yadav 2023, https://arxiv.org/abs/2306.01708, section 3. Kernel: mask by magnitude, with election.
"""

from evomerge.kernels.masks import KEEP_ALL
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Mask
from evomerge.methods.method import (
    DENSITY,
    INT8_MASK,
    LAMBDA,
    WEIGHT,
    Method,
    Values,
    normalize,
    rescale,
    rescaled,
)


def table(values: Values, statistics: TensorStatistics) -> Mask:
    """Return each weight, and the magnitude down to which the density keeps the task vector."""
    weights, densities = values.per_model["weight"], values.per_model["density"]
    thresholds = tuple(statistics.threshold(i, density) for i, density in enumerate(densities))
    levels = (KEEP_ALL,) * len(weights)
    return Mask(
        scales=rescaled(weights, values, statistics, thresholds, levels),
        weights=weights,
        thresholds=thresholds,
        keep_levels=levels,
        key=statistics.mask_key,
        elect=True,
        normalize=bool(values.shared["normalize"]),
        lam=values.shared["lambda"],
    )


METHOD = Method(
    name="ties",
    summary="largest elements of the task vectors, averaged where signs agree",
    source="https://arxiv.org/abs/2306.01708",
    params=(WEIGHT, DENSITY, LAMBDA, normalize(True), rescale(False), INT8_MASK),
    table=table,
    base="required",
)
