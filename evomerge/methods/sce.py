"""SCE: select where models differ most, calculate weights by energy, erase minority signs.

Wan 2024, "FuseChat", https://arxiv.org/abs/2408.07990. Of each tensor the share `select_topk` of
elements is kept whose task vectors vary most between the models, and what varies as much as the
last of them; each model's weight is the mean square of its task vector there; signs are elected
without weights. Kernel: local.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch

from evomerge.config.params import Param
from evomerge.kernels.reference import delta
from evomerge.kernels.statistics import Deltas, TensorStatistics
from evomerge.kernels.tables import Fused, Local
from evomerge.methods.method import INT8_MASK, Method, Values

SMALL = 1e-6
"""Sum of mean squares below which models get equal weights; and the least divisor."""


def table(values: Values, statistics: TensorStatistics) -> Local:
    """Return the expression with the spread down to which elements are kept, and the weights."""
    threshold = _threshold(statistics, float(values.shared["select_topk"]))
    energies = statistics.fleeting(
        ("energies", threshold), lambda: _energies(statistics, threshold)
    )
    num_elements = max(1, len(statistics.source_MP[0]))
    means = [energy / num_elements for energy in energies] or [0.0] * len(statistics.models)
    total = sum(means)
    equal = 1.0 / len(means)
    weights = tuple(mean / total if total >= SMALL else equal for mean in means)
    run = partial(elected, threshold=threshold, weights=weights)
    return Local(run, Fused("sce", (weights,), (threshold,)))


def _threshold(statistics: TensorStatistics, share: float) -> float:
    """Return the smallest spread kept: 0 for all, infinity for none."""
    if share >= 1:
        return 0.0
    varying = Fused("sce varying")
    (num_varying,) = statistics.fact("num varying", lambda: statistics.sums(_varying, varying)) or (
        0.0,
    )
    count = int(num_varying * share)
    return statistics.largest("spread", count, spread) if count else math.inf


def _energies(statistics: TensorStatistics, threshold: float) -> tuple[float, ...]:
    """Return the sum of the squares of each task vector's elements that are kept."""
    squares = Fused("sce squares", shared=(threshold,))
    return statistics.sums(partial(_squares, threshold=threshold), squares)


def spread(deltas: Deltas) -> torch.Tensor:
    """Return M times the variance of task vectors over M models, as a new float32 tensor."""
    # distances from the first: what is equal in all models has a spread of exactly 0
    distances = [task_vector - deltas[0] for task_vector in deltas]
    mean = torch.zeros_like(deltas[0])
    for distance in distances:
        mean.add_(distance)
    mean.mul_(1.0 / len(deltas))
    total = torch.zeros_like(mean)
    for distance in distances:
        total.add_(distance.sub_(mean).square_())
    return total


def _varying(deltas: Deltas) -> list[torch.Tensor]:
    return [(spread(deltas) != 0).double()]


def _squares(deltas: Deltas, threshold: float) -> list[torch.Tensor]:
    kept = spread(deltas) >= threshold
    return [(task_vector * kept).double().square_() for task_vector in deltas]


def elected(
    base: torch.Tensor | None,
    sources: Sequence[torch.Tensor],
    threshold: float,
    weights: tuple[float, ...],
) -> torch.Tensor:
    """Return base plus the elected task vectors; see `tables.Expression`."""
    assert base is not None, "sce starts from a base"
    deltas = [delta(source, base) for source in sources]
    kept = spread(deltas) >= threshold
    total = torch.zeros_like(base)
    for task_vector in deltas:
        total.add_(task_vector.mul_(kept))
    majority = (total >= 0).float().mul_(2.0).sub_(1.0)
    merged, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for task_vector, weight in zip(deltas, weights, strict=True):
        agrees = task_vector.sign() == majority
        merged.add_(task_vector.mul_(agrees).mul_(weight))
        divisor.add_(agrees.float().mul_(weight))
    return merged.div_(divisor.clamp_min_(SMALL)).add_(base)


METHOD = Method(
    name="sce",
    summary="where task vectors differ most, averaged by energy where signs agree",
    source="https://arxiv.org/abs/2408.07990",
    params=(
        Param(
            name="select_topk",
            meaning="share of the elements, those that vary most between models, that is kept",
            default=1.0,
            per_model=False,
            low=0.0,
            high=1.0,
            search=(0.1, 1.0),
        ),
        INT8_MASK,
    ),
    table=table,
    base="required",
)
