"""Passthrough: one model as it is, so that a base or a parent takes the same path as a merge.

Kernel: span over the one model with coefficient 1, which gives back the stored bits.
"""

from evomerge.config.params import Param
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Span
from evomerge.methods.method import Method, Values


def table(values: Values, statistics: TensorStatistics) -> Span:
    """Return the one model's scale as its coefficient."""
    return Span(values.per_model["scale"])


METHOD = Method(
    name="passthrough",
    summary="one model as it is",
    source="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    params=(Param("scale", "factor on the model's tensors", default=1.0, per_model=True),),
    table=table,
    base="listed",
    max_parents=1,
)
