"""NearSwap: take one other model's elements where they are near the base's, less of them beyond.

Alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001. An element that is
no further than `t` from the base's is taken over; of one further away the share `t / distance`.
Kernel: local.
"""

from collections.abc import Sequence
from functools import partial

import torch

from evomerge.config.params import Param
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Fused, Local
from evomerge.methods.method import Method, Values

SMALLEST_DISTANCE = 1e-6
"""Distance that stands for every smaller one, so that none is divided by 0."""


def table(values: Values, statistics: TensorStatistics) -> Local:
    """Return the expression at `t`."""
    t = float(values.shared["t"])
    return Local(partial(swapped, t=t), Fused("nearswap", shared=(t,)))


def swapped(base: torch.Tensor | None, sources: Sequence[torch.Tensor], t: float) -> torch.Tensor:
    """Return base and model mixed element by element; see `tables.Expression`."""
    assert base is not None, "nearswap starts from a base"
    distance = (base - sources[0]).abs_().clamp_min_(SMALLEST_DISTANCE)
    share = torch.full_like(distance, t).div_(distance).clamp_max_(1.0)
    return (share * sources[0]).add_((1.0 - share).mul_(base))


METHOD = Method(
    name="nearswap",
    summary="one other model's elements where they are near the base's",
    source="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    params=(
        Param(
            name="t",
            meaning="distance up to which an element of the other model is taken over",
            default=None,
            per_model=False,
            low=0.0,
            search=(0.0, 0.01),
        ),
    ),
    table=table,
    base="required",
    max_parents=1,
)
