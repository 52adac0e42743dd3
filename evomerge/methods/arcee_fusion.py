"""Arcee Fusion: the base, with the most important changes of one other model.

mergekit's method, https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md. A change is
as important as it is large, times how far the row's softmax moves (Kullback-Leibler divergence).
Changes are taken from 1.5 times the interquartile range above the median importance on. Works on
whole tensors.
"""

from collections.abc import Sequence

import torch

from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Whole
from evomerge.methods.method import Method, Values

SMALL_PROBABILITY = 1e-8
"""Added to every probability, so that none is 0."""


def table(values: Values, statistics: TensorStatistics) -> Whole:
    """Return the merge of the whole tensor; there is nothing to set."""
    return Whole(fuse, statistics.full_shape)


def fuse(base: torch.Tensor | None, sources: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the base with the important elements of the one source's task vector added."""
    assert base is not None, "the changes are those of a base"
    (source,) = sources
    importance = _importance(base, source)
    kept = importance >= threshold(importance)
    return (source - base).mul_(kept).add_(base)


def _importance(base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    # in float32 like mergekit: which elements pass hangs on the last digits of the divergence
    of_source = torch.softmax(source, dim=-1).add_(SMALL_PROBABILITY)
    of_base = torch.softmax(base, dim=-1).add_(SMALL_PROBABILITY)
    divergence = (of_source / of_base).log_().mul_(of_source).sum(-1, keepdim=True)
    return (source - base).abs_().mul_(divergence)


def threshold(importance: torch.Tensor) -> torch.Tensor:
    """Return the importance from which on an element is taken, exact for tensors of any size."""
    ordered_P = importance.flatten().sort().values
    first, median, third = (ordered_P[int(q * (len(ordered_P) - 1))] for q in (0.25, 0.5, 0.75))
    return median + 1.5 * (third - first)


METHOD = Method(
    name="arcee_fusion",
    summary="base plus the most important changes of one other model",
    source="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    params=(),
    table=table,
    base="required",
    max_parents=1,
)
