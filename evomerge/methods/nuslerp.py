"""NuSLERP: SLERP between two models, or between their task vectors, with a weight for each.

From mergekit, https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md. The position is
the second weight divided by the sum of both. The angle is that between the whole tensors (kernel:
span), or each row or column has its own.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import torch

from evomerge.config.params import Param
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Span, Whole
from evomerge.methods.method import WEIGHT, Method, Values
from evomerge.methods.slerp import arc, is_single, refuse_opposite

NO_WEIGHT = 1e-6
"""Sum of the weights, of either sign, below which they name no place on the arc."""

NO_DIRECTION = 1e-7
"""Norm below which a tensor or row counts as having this norm."""

STRAIGHT = 2.0**-23
"""Squared sine up to which a row takes the straight line: float32 cannot tell its arc."""


def table(values: Values, statistics: TensorStatistics) -> Span | Whole:
    """Return the coefficients of both models, or the merge row by row."""
    first, second = values.per_model["weight"]
    t = second / (first + second)
    if values.shared["nuslerp_flatten"]:
        return _flat(t, statistics)
    along = 0 if values.shared["nuslerp_row_wise"] else -1
    return Whole(partial(by_rows, t=t, along=along), statistics.full_shape)


def _flat(t: float, statistics: TensorStatistics) -> Span:
    with_base = statistics.base_P is not None
    (xx, xy), (_, yy) = (row[-2:] for row in statistics.gram()[-2:])
    cosine = xy / (max(math.sqrt(xx), NO_DIRECTION) * max(math.sqrt(yy), NO_DIRECTION))
    straight = t in (0.0, 1.0) or (cosine > 0 and 1.0 - cosine**2 <= STRAIGHT)
    if straight or is_single(statistics):
        return Span((1.0 - t, t), base=1.0, deltas=with_base)
    refuse_opposite(cosine, statistics, statistics.models)
    return Span(arc(t, cosine), base=1.0, deltas=with_base)


def by_rows(
    base: torch.Tensor | None, sources: Sequence[torch.Tensor], *, t: float, along: int
) -> torch.Tensor:
    """Merge two float32 tensors along the arcs between their vectors.

    A vector of one number, or two vectors that are parallel or opposite as far as float32 can tell,
    are merged along the straight line: one row of thousands must not stop a merge.

    Args:
        base: Where the task vectors start; None to merge the tensors themselves.
        sources: The two tensors.
        t: Position on the arc, in [0, 1] for weights of one sign.
        along: Dimension that the vectors lie along.
    """
    x, y = sources if base is None else [source - base for source in sources]
    norms = [v.square().sum(along, dtype=torch.float64, keepdim=True).sqrt_() for v in (x, y)]
    length = norms[0].clamp_min_(NO_DIRECTION) * norms[1].clamp_min_(NO_DIRECTION)
    cosine = (x * y).sum(along, dtype=torch.float64, keepdim=True) / length
    straight = 1.0 - cosine.square() <= STRAIGHT
    angle = cosine.masked_fill_(straight, 0.0).acos_()
    of_x, of_y = (
        torch.where(straight, share, torch.sin(share * angle) / torch.sin(angle)).float()
        for share in (1.0 - t, t)
    )
    merged = (x * of_x).add_(y * of_y)
    return merged if base is None else merged.add_(base)


def weights_cancel(values: Values) -> str | None:
    """Refuse weights that add up to nothing."""
    weights = values.per_model["weight"]
    if abs(sum(weights)) < NO_WEIGHT:
        return f"the weights {weights} add up to 0, which is no place on an arc. Change them."
    return None


METHOD = Method(
    name="nuslerp",
    summary="along the arc between two models or their task vectors, by weights",
    source="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    params=(
        dataclasses.replace(WEIGHT, meaning="share of this model in the way along the arc"),
        Param(
            "nuslerp_flatten",
            "one angle for the whole tensor; if false, one for each of its rows",
            default=True,
            per_model=False,
            kind="bool",
        ),
        Param(
            "nuslerp_row_wise",
            "without nuslerp_flatten: vectors along the first dimension, not along the last",
            default=False,
            per_model=False,
            kind="bool",
        ),
    ),
    table=table,
    base="optional",
    refuse=weights_cancel,
    min_parents=2,
    max_parents=2,
)
