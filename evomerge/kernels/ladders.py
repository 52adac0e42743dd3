"""Ladder: the thresholds of all task vectors of a tensor, found in one look-up for any densities.

Letters: M models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evomerge.kernels.histograms import Histogram, smallest_with


@dataclass(frozen=True)
class Ladder:
    """The magnitudes that occur in each task vector of a tensor, and how many have at least those.

    Attributes:
        size: Elements of the tensor, at least 1.
        counts: Elements with a magnitude or a larger one, for one model after another, each
            model's raised by `starts` so that they ascend through all of them; int64.
        thresholds: The smallest float32 number that compares equal to each magnitude.
        starts_M: What each model's counts are raised by.
    """

    size: int
    counts: np.ndarray
    thresholds: np.ndarray
    starts_M: np.ndarray

    def at(self, densities: Sequence[float]) -> tuple[float, ...]:
        """Return what `TensorStatistics.threshold` gives for each model's density."""
        rank_M = np.maximum((np.array(densities) * self.size).astype(np.int64), 1)
        places_M = self.counts.searchsorted(rank_M + self.starts_M)
        found = tuple(self.thresholds[places_M].tolist())
        if min(densities) > 0 and max(densities) < 1:
            return found
        return tuple(map(_at_an_end, found, densities))


def _at_an_end(threshold: float, density: float) -> float:
    if density >= 1:
        return 0.0
    return math.inf if density <= 0 else threshold


def ladder_of(size: int, histograms: Sequence[Histogram], dtypes: Sequence[torch.dtype]) -> Ladder:
    """Make the ladder of a tensor.

    Args:
        size: Elements of the tensor, at least 1.
        histograms: Of each task vector's magnitudes, all of them.
        dtypes: What each one's magnitudes were rounded to, of 16 bits.
    """
    starts_M = size * np.arange(len(histograms))
    counts = [
        histogram.counts + start for histogram, start in zip(histograms, starts_M, strict=True)
    ]
    thresholds = [
        smallest_with(int(key), dtype)
        for histogram, dtype in zip(histograms, dtypes, strict=True)
        for key in histogram.keys
    ]
    return Ladder(size, np.concatenate(counts), np.array(thresholds, np.float32), starts_M)
