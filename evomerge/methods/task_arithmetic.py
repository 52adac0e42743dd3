"""Task arithmetic: the base plus a weighted sum of task vectors.

Ilharco 2022, https://arxiv.org/abs/2212.04089, section 2. Kernel: span over the task vectors.
"""

from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Span
from evomerge.methods.method import INT8_MASK, LAMBDA, WEIGHT, Method, Values, normalize, shares


def table(values: Values, statistics: TensorStatistics) -> Span:
    """Return lambda times each weight, divided by their sum where `normalize` is set."""
    return values.once(_span)


def _span(values: Values) -> Span:
    return Span(shares(values), base=1.0, deltas=True)


METHOD = Method(
    name="task_arithmetic",
    summary="base plus a weighted sum of task vectors",
    source="https://arxiv.org/abs/2212.04089",
    params=(WEIGHT, LAMBDA, normalize(False), INT8_MASK),
    table=table,
    base="required",
)
