"""RAM: average task vectors where several have an element, and add what only one has undiminished.

"Reinforced Agent Merging", 2026, https://arxiv.org/abs/2601.13572. A model has an element where its
task vector is above `epsilon` in magnitude. `ramplus_tl` scales up what only one model has, the
more of its elements in the tensor are shared. Kernel: local.
"""

from collections.abc import Sequence
from functools import partial

import torch

from evomerge.config.params import Param
from evomerge.kernels.reference import delta
from evomerge.kernels.statistics import Deltas, TensorStatistics
from evomerge.kernels.tables import Fused, Local
from evomerge.methods.method import Method, Values

EPSILON = Param(
    name="epsilon",
    meaning="magnitude up to which an element of a task vector counts as none",
    default=1e-5,
    per_model=False,
    low=0.0,
    search=(0.0, 1e-3),
)


def table(values: Values, statistics: TensorStatistics) -> Local:
    """Return the expression, with a factor of 1 for what only one model has."""
    return _joining(float(values.shared["epsilon"]), (1.0,) * len(statistics.models))


def plus_table(values: Values, statistics: TensorStatistics) -> Local:
    """Return the expression, with factors by how much of each task vector is shared."""
    epsilon, r, alpha = (float(values.shared[name]) for name in ("epsilon", "r", "alpha"))
    counts = statistics.fleeting(
        ("shared and unique", epsilon),
        lambda: statistics.sums(
            partial(_shares, epsilon=epsilon), Fused("ram shares", shared=(epsilon,))
        ),
    )
    num_models = len(statistics.models)
    pairs = zip(counts[:num_models], counts[num_models:], strict=True)
    factors = tuple(1.0 + r * _limited_ratio(s, max(u, epsilon), alpha) for s, u in pairs)
    return _joining(epsilon, factors)


def _joining(epsilon: float, factors: tuple[float, ...]) -> Local:
    run = partial(joined, epsilon=epsilon, factors=factors)
    return Local(run, Fused("ram", (factors,), (epsilon,)))


def _limited_ratio(shared: float, unique: float, limit: float) -> float:
    return shared / unique if shared < limit * unique else limit * (shared > 0)


def _shares(deltas: Deltas, epsilon: float) -> list[torch.Tensor]:
    """Mark which elements each model shares, and then which it has alone."""
    active = [(task_vector.abs() > epsilon).double() for task_vector in deltas]
    count = sum(active[1:], start=active[0])
    return [a * (count > 1) for a in active] + [a * (count == 1) for a in active]


def joined(
    base: torch.Tensor | None,
    sources: Sequence[torch.Tensor],
    epsilon: float,
    factors: tuple[float, ...],
) -> torch.Tensor:
    """Return base plus joined task vectors; see `tables.Expression`."""
    assert base is not None, "ram starts from a base"
    count, total, alone = (torch.zeros_like(base) for _ in range(3))
    for source, factor in zip(sources, factors, strict=True):
        task_vector = delta(source, base)
        active = task_vector.abs() > epsilon
        task_vector.mul_(active)
        count.add_(active)
        total.add_(task_vector)
        alone.add_(task_vector.mul_(factor))
    merged = torch.where(count > 1, total.div_(count.clamp_min(1.0)), alone)
    return merged.add_(base)


METHOD = Method(
    name="ram",
    summary="mean of the task vectors that have an element, and all of what only one has",
    source="https://arxiv.org/abs/2601.13572",
    params=(EPSILON,),
    table=table,
    base="required",
)

PLUS = Method(
    name="ramplus_tl",
    summary="as ram, with what only one model has scaled up by what the model shares",
    source="https://arxiv.org/abs/2601.13572",
    params=(
        EPSILON,
        Param(
            name="r",
            meaning="how much shared elements scale up those that only one model has",
            default=0.1,
            per_model=False,
            search=(0.0, 0.5),
        ),
        Param(
            name="alpha",
            meaning="most that shared elements, divided by those of one model, count",
            default=0.2,
            per_model=False,
            low=0.0,
            search=(0.0, 1.0),
        ),
    ),
    table=plus_table,
    base="required",
)
