"""TSV: leading singular vectors of all task vectors side by side, made orthogonal to each other.

Gargiulo 2024, "Task singular vectors", https://arxiv.org/abs/2412.00081, section 4 (TSV-Merge).
Matrices only; of other tensors the mean of the task vectors is taken. Letters: R rows, C columns,
k singular directions, of all models together.
"""

from functools import partial

import torch

from evomerge.config.params import Param
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Span, Whole
from evomerge.methods.direction import Deltas, along, singular
from evomerge.methods.method import LAMBDA, Method, Values


def table(values: Values, statistics: TensorStatistics) -> Span | Whole:
    """Return the base plus lambda times the merged directions."""
    share = float(values.shared["rank_share"]) or 1.0 / len(statistics.models)
    find = partial(merged_directions, share=share)
    return along(find, values.shared["lambda"], statistics, "tsv", share)


def merged_directions(deltas: Deltas, share: float) -> torch.Tensor:
    """Merge task vectors of one matrix.

    Args:
        deltas: (R, C) in float64.
        share: Part of each task vector's min(R, C) singular directions that is kept, rounded down,
            at least one.
    """
    rank = max(1, int(share * min(deltas[0].shape)))
    parts = [singular(delta) for delta in deltas]
    left_Rk = torch.cat([left[:, :rank] for left, _, _ in parts], dim=1)
    value_k = torch.cat([value[:rank] for _, value, _ in parts])
    right_kC = torch.cat([right[:rank] for _, _, right in parts])
    return (orthogonal(left_Rk) * value_k) @ orthogonal(right_kC)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return the nearest matrix with orthonormal columns (rows, where it is wide).

    Directions that the matrix lacks stay absent, as with equal models.
    """
    left, _, right = singular(matrix)
    return left @ right


METHOD = Method(
    name="tsv",
    summary="leading singular directions of the task vectors, made orthogonal to each other",
    source="https://arxiv.org/abs/2412.00081",
    params=(
        LAMBDA,
        Param(
            "rank_share",
            "share of each task vector's singular directions; 0 is one by the number of models",
            default=0.0,
            per_model=False,
            low=0.0,
            high=1.0,
        ),
    ),
    table=table,
    base="required",
)
