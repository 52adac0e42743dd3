"""Iso-C: the sum of the task vectors with all its singular values made equal.

Marczak 2025, "No task left behind", https://arxiv.org/abs/2502.04959, section 4.1. Directions that
few models share get as much room as those that all share. Matrices only; of other tensors the mean
of the task vectors is taken.
"""

import torch

from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Span, Whole
from evomerge.methods.direction import Deltas, along, singular
from evomerge.methods.method import LAMBDA, Method, Values


def table(values: Values, statistics: TensorStatistics) -> Span | Whole:
    """Return the base plus lambda times the evened-out sum."""
    return along(isotropic, values.shared["lambda"], statistics, "iso_c")


def isotropic(deltas: Deltas) -> torch.Tensor:
    """Return the sum of float64 matrices with every singular value at their mean.

    Singular values of 0 have no direction: they stay 0 and do not count.
    """
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    left, value_k, right = singular(total)
    return left @ right * value_k.mean() if len(value_k) else total


METHOD = Method(
    name="iso_c",
    summary="sum of the task vectors with equal singular values",
    source="https://arxiv.org/abs/2502.04959",
    params=(LAMBDA,),
    table=table,
    base="required",
)
