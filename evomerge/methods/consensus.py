"""Consensus: the task vectors' sum, only where enough tasks need it.

Wang 2024, "Localizing task information for improved model merging and compression",
https://arxiv.org/abs/2405.07813. A task needs an element where its own task vector is at least
`lambda_mask` times as large as the sum of the others' (its TALL mask); elements that fewer than
`min_tasks` need are left at the base. Kernel: local.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch

from evomerge.config.params import Param
from evomerge.kernels.reference import delta
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Fused, Local
from evomerge.methods.method import LAMBDA, WEIGHT, Method, Values


def table(values: Values, statistics: TensorStatistics) -> Local:
    """Return the expression with its weights, the masks' factors and the least number of tasks."""
    lam = values.shared["lambda"]
    weights = tuple(lam * weight for weight in values.per_model["weight"])
    factors, min_tasks = values.per_model["lambda_mask"], int(values.shared["min_tasks"])
    run = partial(agreed, weights=weights, factors=factors, min_tasks=min_tasks)
    return Local(run, Fused("consensus", (weights, factors), (float(min_tasks),)))


def agreed(
    base: torch.Tensor | None,
    sources: Sequence[torch.Tensor],
    weights: tuple[float, ...],
    factors: tuple[float, ...],
    min_tasks: int,
) -> torch.Tensor:
    """Return base plus the weighted task vectors where enough tasks agree; see `Expression`."""
    assert base is not None, "consensus starts from a base"
    deltas = [delta(source, base) for source in sources]
    total = torch.zeros_like(base)
    for task_vector in deltas:
        total.add_(task_vector)
    needed, merged = torch.zeros_like(base), torch.zeros_like(base)
    for task_vector, weight, factor in zip(deltas, weights, factors, strict=True):
        others = (total - task_vector).abs_().mul_(factor)
        needed.add_(task_vector.abs() >= others)
        merged.add_(task_vector.mul_(weight))
    return merged.mul_(needed >= min_tasks).add_(base)


def too_many_tasks(values: Values) -> str | None:
    """Refuse to ask for more tasks than there are."""
    min_tasks, num_models = values.shared["min_tasks"], len(values.per_model["weight"])
    if min_tasks > num_models:
        return (
            f"min_tasks is {min_tasks:g} and {num_models} models are merged, so no element would "
            "be kept. Use a smaller number."
        )
    return None


METHOD = Method(
    name="consensus",
    summary="weighted sum of the task vectors where enough of them matter",
    source="https://arxiv.org/abs/2405.07813",
    params=(
        dataclasses.replace(WEIGHT, default=1.0),
        Param(
            name="lambda_mask",
            meaning="how large this model's element must be, as a multiple of the others' sum",
            default=0.4,
            per_model=True,
            low=0.0,
            search=(0.2, 0.8),
        ),
        Param(
            name="min_tasks",
            meaning="fewest models that must need an element for it to be merged",
            default=2,
            per_model=False,
            kind="int",
            low=1,
            search=(1, 2),
        ),
        LAMBDA,
    ),
    table=table,
    base="required",
    min_parents=2,
    refuse=too_many_tasks,
)
