"""Ranks of magnitudes within rows, in one byte: what DELLA's chances of being kept depend on."""

import torch

MIDDLE = 127
"""The rank in the middle of a row: of all its elements where they are equal, or of the only one."""

HIGHEST = 2 * MIDDLE
"""The rank of a row's largest element, where no other equals it; the smallest has 0."""

_BLOCK = 2**20
"""Most elements ranked at once, unless a row has more; ranks do not depend on it."""


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
    shape = (1, *shape) if len(shape) < 2 else shape
    row_RN = magnitude_P.reshape(shape).movedim(1, -1)
    rank_RN = torch.empty_like(row_RN, dtype=torch.uint8, memory_format=torch.contiguous_format)
    size = max(1, shape[1])
    rows, ranks = row_RN.reshape(-1, size), rank_RN.view(-1, size)
    step = max(1, _BLOCK // size)
    for start in range(0, len(rows), step):
        ranks[start : start + step] = _ranks(rows[start : start + step])
    return rank_RN.movedim(-1, 1).reshape(-1)


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
