"""Ranks of magnitudes within rows, in one byte: what DELLA's chances of being kept depend on."""

import torch

from evomerge.kernels import native_statistics
from evomerge.kernels.sums import PIECE, delta_pieces

MIDDLE = 127
"""The rank in the middle of a row: of all its elements where they are equal, or of the only one."""

HIGHEST = 2 * MIDDLE
"""The rank of a row's largest element, where no other equals it; the smallest has 0."""

_BLOCK = 2**20
"""Most elements ranked at once, unless a row has more; ranks do not depend on it."""


def delta_ranks(
    base_P: torch.Tensor, source_P: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """Return the ranks of a task vector's magnitudes; see `row_ranks`. In C where that is possible.

    Args:
        base_P: The base.
        source_P: The parent.
        dtype: In which magnitudes compare: float32, or the 16-bit dtype of both.
        shape: The tensor's shape.
    """
    full = _at_least_2d(shape)
    base_RN, source_RN = (
        tensor_P.reshape(full).movedim(1, -1).reshape(-1) for tensor_P in (base_P, source_P)
    )
    rank_RN = native_statistics.row_ranks(base_RN, source_RN, dtype, full[1])
    if rank_RN is not None:
        return rank_RN.view(full[0], *full[2:], full[1]).movedim(-1, 1).reshape(-1)
    magnitude_P = torch.empty(len(base_P), device=base_P.device)
    places = zip(magnitude_P.split(PIECE), delta_pieces(base_P, [source_P]), strict=False)
    for place_P, [piece_P] in places:
        place_P.copy_(piece_P.abs_().to(dtype))
    return row_ranks(magnitude_P, shape)


def row_ranks(magnitude_P: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return each element's rank among those of its row, from 0 to `HIGHEST`.

    A row goes along the second dimension, in a tensor of one dimension along that. Equal elements
    share the mean of their ranks, so that what stands first in a row makes no difference.

    Args:
        magnitude_P: Magnitudes of a tensor, flat.
        shape: The tensor's shape.

    Returns:
        A new flat uint8 tensor.
    """
    shape = _at_least_2d(shape)
    row_RN = magnitude_P.reshape(shape).movedim(1, -1)
    rank_RN = torch.empty_like(row_RN, dtype=torch.uint8, memory_format=torch.contiguous_format)
    size = max(1, shape[1])
    rows, ranks = row_RN.reshape(-1, size), rank_RN.view(-1, size)
    step = max(1, _BLOCK // size)
    for start in range(0, len(rows), step):
        ranks[start : start + step] = _ranks(rows[start : start + step])
    return rank_RN.movedim(-1, 1).reshape(-1)


def _at_least_2d(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *shape) if len(shape) < 2 else shape


def _ranks(row_RN: torch.Tensor) -> torch.Tensor:
    last = row_RN.shape[1] - 1
    if last == 0:
        return torch.full_like(row_RN, MIDDLE, dtype=torch.uint8)
    row_RN = row_RN.contiguous()
    sorted_RN = row_RN.sort(dim=1).values
    first_RN = torch.searchsorted(sorted_RN, row_RN)
    behind_RN = torch.searchsorted(sorted_RN, row_RN, right=True)
    # MIDDLE * (first + last place) / (n - 1), to the nearest whole number
    twice_mean_RN = first_RN + behind_RN - 1
    return ((2 * MIDDLE * twice_mean_RN + last) // (2 * last)).to(torch.uint8)
