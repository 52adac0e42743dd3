"""Breadcrumbs: task vectors without their smallest elements and without their few largest.

Davari 2023, "Model breadcrumbs", https://arxiv.org/abs/2312.06795; summed as they are, or with
signs elected as in TIES. In each tensor the share `gamma` of largest elements is dropped, and of
the rest the largest are kept until `density` is reached. What equals the largest one kept stays;
what equals the smallest one, too, or as much of it as the recipe's `threshold_ties` says. Kernel:
mask by magnitude.
"""

import dataclasses
from functools import partial

from evomerge.config.params import Param
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
    finished,
    normalize,
    rescale,
)


def table(values: Values, statistics: TensorStatistics, elect: bool) -> Mask:
    """Return each weight, and the magnitudes between which the task vector is kept."""
    weights = values.per_model["weight"]
    densities, gammas = values.per_model["density"], values.per_model["gamma"]
    shares = zip(densities, gammas, strict=True)
    bands = [statistics.band(i, density, gamma) for i, (density, gamma) in enumerate(shares)]
    kept = Mask(
        scales=weights,
        weights=weights,
        thresholds=tuple(threshold for threshold, _ in bands),
        keep_levels=(KEEP_ALL,) * len(weights),
        key=statistics.mask_key,
        ceilings=tuple(ceiling for _, ceiling in bands),
        tie_cuts=statistics.tie_cuts(densities, gammas),
    )
    return finished(kept, values, statistics, elect)


LINEAR = Method(
    name="breadcrumbs",
    summary="task vectors without their smallest and largest elements, in a weighted sum",
    source="https://arxiv.org/abs/2312.06795",
    params=(
        WEIGHT,
        DENSITY,
        Param(
            name="gamma",
            meaning="share of this model's task vector, its largest elements, that is dropped",
            default=0.01,
            per_model=True,
            low=0.0,
            high=1.0,
            search=(0.0, 0.05),
        ),
        LAMBDA,
        normalize(False),
        rescale(False),
        INT8_MASK,
    ),
    table=partial(table, elect=False),
    base="required",
    has_threshold=True,
)

TIES = dataclasses.replace(
    LINEAR,
    name="breadcrumbs_ties",
    summary="task vectors without their smallest and largest elements, summed where signs agree",
    table=partial(table, elect=True),
)
