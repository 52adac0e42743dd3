"""TIES: trim task vectors to their largest elements, elect a sign, average those that agree.

Yadav 2023, https://arxiv.org/abs/2306.01708, section 3. Each tensor is trimmed by itself, as
mergekit does; `trim_whole_model` trims over all tensors together, as in the paper. All elements
that equal the smallest one kept stay, or as many as the recipe's `threshold_ties` says. Kernel:
mask by magnitude, with election.
"""

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


def table(values: Values, statistics: TensorStatistics) -> Mask:
    """Return each weight, and the magnitude down to which the density keeps the task vector."""
    weights, densities = values.per_model["weight"], values.per_model["density"]
    if values.shared["trim_whole_model"]:
        thresholds = tuple(map(statistics.whole_threshold, range(len(weights)), densities))
    else:
        thresholds = statistics.thresholds(densities)
    levels = (KEEP_ALL,) * len(weights)
    cuts = statistics.tie_cuts(densities)
    kept = Mask(weights, weights, thresholds, levels, statistics.mask_key, tie_cuts=cuts)
    return finished(kept, values, statistics, elect=True)


METHOD = Method(
    name="ties",
    summary="largest elements of the task vectors, averaged where signs agree",
    source="https://arxiv.org/abs/2306.01708",
    params=(
        WEIGHT,
        DENSITY,
        LAMBDA,
        normalize(True),
        rescale(False),
        Param(
            name="trim_whole_model",
            meaning="keep the largest elements of the whole task vector, not of each tensor",
            default=False,
            per_model=False,
            kind="bool",
        ),
        INT8_MASK,
    ),
    table=table,
    base="required",
    has_threshold=True,
)
