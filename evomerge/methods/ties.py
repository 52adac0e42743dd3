"""TIES: trim task vectors to their largest elements, elect a sign, average those that agree.

Yadav 2023, https://arxiv.org/abs/2306.01708, section 3. Each tensor is trimmed by itself, as
mergekit does; `trim_whole_model` trims over all tensors together, as in the paper. Kernel: mask by
magnitude, with election.
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
    whole = values.shared["trim_whole_model"]
    threshold = statistics.whole_threshold if whole else statistics.threshold
    thresholds = tuple(threshold(i, density) for i, density in enumerate(densities))
    levels = (KEEP_ALL,) * len(weights)
    kept = Mask(weights, weights, thresholds, levels, statistics.mask_key)
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
)
