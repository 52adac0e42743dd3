"""Elements that tie at a threshold: how many of them are wanted, and where those of them end.

Integers only, so they are the same wherever they are made. Letters: P elements of a flat tensor.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from evomerge.kernels.histograms import Histogram


def tied_at(
    rank: int, dtype: torch.dtype, counts: Callable[[int | None], Histogram]
) -> tuple[int, int]:
    """Return how many that equal the rank-th largest are among the `rank` largest, and how many do.

    Args:
        rank: From 1 to the number of elements.
        dtype: What the elements were rounded to.
        counts: Gives the histogram of all elements, or `within` one bin; see `count_keys`.
    """
    histogram = counts(None)
    key, num_larger = histogram.key_at(rank)
    if dtype is torch.float32:
        histogram, rank = counts(key), rank - num_larger
        _, num_larger = histogram.key_at(rank)
    not_smaller = int(histogram.counts[np.searchsorted(histogram.counts, rank)])
    return rank - num_larger, not_smaller - num_larger


def end_of_tied(pieces: Iterable[torch.Tensor], low: float, above: float, count: int) -> int:
    """Return the index behind the count-th element from `low` up to below `above`.

    Args:
        pieces: Consecutive pieces of the magnitudes of a tensor, float32; read only so far.
        low: Float32 number.
        above: Float32 number.
        count: From 1 to the number of such elements.
    """
    first = 0
    for magnitude_P in pieces:
        ties_P = (magnitude_P >= low).logical_and_(magnitude_P < above)
        num_ties = int(ties_P.count_nonzero())
        if count <= num_ties:
            return first + int(ties_P.nonzero()[count - 1]) + 1
        count -= num_ties
        first += len(magnitude_P)
    raise AssertionError("fewer elements tie than were counted")
