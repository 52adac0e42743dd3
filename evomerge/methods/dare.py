"""DARE: drop random elements of the task vectors and scale up the rest; then sum, plain or by TIES.

Yu 2023, https://arxiv.org/abs/2311.03099. Survivors are scaled to the L1 norm of the whole task
vector, as mergekit does, and not by 1/density as in the paper. Kernel: mask by random numbers.
"""

import dataclasses

from evomerge.kernels.masks import keep_level
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Mask
from evomerge.methods.method import (
    DENSITY,
    INT8_MASK,
    LAMBDA,
    WEIGHT,
    Method,
    Values,
    divisor,
    normalize,
    rescale,
    rescaled,
)


def linear_table(values: Values, statistics: TensorStatistics) -> Mask:
    """Return lambda times each rescaled weight, divided by their sum where `normalize` is set."""
    total, lam = divisor(values), values.shared["lambda"]
    coefficients = tuple(lam * weight / total for weight in values.per_model["weight"])
    return _dropping(values, statistics, coefficients)


def ties_table(values: Values, statistics: TensorStatistics) -> Mask:
    """Return each rescaled weight; election, division and lambda are left to the kernel."""
    return dataclasses.replace(
        _dropping(values, statistics, values.per_model["weight"]),
        elect=True,
        normalize=bool(values.shared["normalize"]),
        lam=values.shared["lambda"],
    )


def _dropping(
    values: Values, statistics: TensorStatistics, coefficients: tuple[float, ...]
) -> Mask:
    levels = tuple(keep_level(density) for density in values.per_model["density"])
    thresholds = (0.0,) * len(levels)
    scales = rescaled(coefficients, values, statistics, thresholds, levels)
    return Mask(scales, values.per_model["weight"], thresholds, levels, statistics.mask_key)


LINEAR = Method(
    name="dare_linear",
    summary="random elements of the task vectors, rescaled, in a weighted sum",
    source="https://arxiv.org/abs/2311.03099",
    params=(WEIGHT, DENSITY, LAMBDA, normalize(False), rescale(True), INT8_MASK),
    table=linear_table,
    base="required",
    random_masks=True,
)

TIES = dataclasses.replace(
    LINEAR,
    name="dare_ties",
    summary="random elements of the task vectors, rescaled, summed where signs agree",
    table=ties_table,
)
