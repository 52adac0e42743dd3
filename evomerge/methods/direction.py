"""Direction: a merged task vector that does not depend on how far a candidate goes along it.

What takes a factorisation of a whole matrix is found once per tensor and kept for the candidates of
a search, which differ in the scale. Of other tensors the mean of the task vectors is taken.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch

from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Span, Whole

Deltas = Sequence[torch.Tensor]
Keep = Callable[[Callable[[], torch.Tensor]], torch.Tensor]
"""Gives what is kept, computing it where it is not."""

NO_VALUE = 2.0**-23
"""Singular value, relative to the largest, from which on its vectors are of rounding alone."""


def along(
    find: Callable[[Deltas], torch.Tensor],
    lam: float,
    statistics: TensorStatistics,
    key: Hashable,
    variant: Hashable = None,
) -> Span | Whole:
    """Return the base plus `lam` times a direction.

    Args:
        find: From the task vectors of a matrix, in float64, to the direction.
        lam: How far to go.
        statistics: Of the tensor.
        key: Name of the method.
        variant: Whatever else the direction depends on.
    """
    if len(statistics.full_shape) != 2:
        num_models = len(statistics.models)
        return Span((lam / num_models,) * num_models, base=1.0, deltas=True)
    key = (key, statistics.name, statistics.base, statistics.models)
    keep = partial(statistics.cache.tensor, key, variant)
    return Whole(partial(_go, find=find, lam=lam, keep=keep), statistics.full_shape)


def _go(
    base: torch.Tensor | None,
    sources: Sequence[torch.Tensor],
    *,
    find: Callable[[Deltas], torch.Tensor],
    lam: float,
    keep: Keep,
) -> torch.Tensor:
    assert base is not None, "directions start at a base"
    direction = keep(partial(_found, base, sources, find))
    return (direction * lam).add_(base)


def _found(
    base: torch.Tensor, sources: Sequence[torch.Tensor], find: Callable[[Deltas], torch.Tensor]
) -> torch.Tensor:
    # subtracted in float64: factors of matrices magnify what rounding does to small directions
    return find([source.double() - base for source in sources]).float()


def singular(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the singular value decomposition without what is rounding alone.

    Vectors of a singular value of 0 could point anywhere, so a method must not see them.

    Args:
        matrix: (R, C) in float64.

    Returns:
        Left vectors (R, k), singular values (k), and right vectors (k, C), largest first.
    """
    left, value_k, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = value_k > NO_VALUE * value_k[:1]
    return left[:, kept], value_k[kept], right[kept]
