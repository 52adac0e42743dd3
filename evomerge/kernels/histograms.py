"""Exact order statistics by counting: integers only, so they are the same wherever they are made.

A magnitude's key is its bits, which order as the numbers do: all 32 of a float32, or the 16 of a
half-precision number that it is rounded to. Keys of 32 bits are counted in two passes, by their
upper and, within one bin of those, by their lower 16. Letters: P elements of one flat tensor.
"""

import struct
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evomerge.kernels import native_statistics
from evomerge.kernels.sums import Deltas, delta_pieces


@dataclass(frozen=True)
class Histogram:
    """How many elements have at least a magnitude key, for the keys that occur.

    Attributes:
        keys: Descending, int32.
        counts: Elements with this key or a larger one, int64.
    """

    keys: np.ndarray
    counts: np.ndarray

    def key_at(self, rank: int) -> tuple[int, int]:
        """Return the key of the rank-th largest element (from 1), and how many keys are larger."""
        place = int(np.searchsorted(self.counts, rank))
        return int(self.keys[place]), int(self.counts[place - 1]) if place else 0


def count_keys(
    pieces: Iterable[torch.Tensor], dtype: torch.dtype, within: int | None = None
) -> Histogram:
    """Count magnitudes by the keys of a dtype, of float32 by the upper 16 bits of them.

    Args:
        pieces: The magnitudes, float32 and not negative.
        dtype: What they are rounded to: float32, bfloat16 or float16.
        within: Count those of one float32 bin, by their lower 16 bits; None counts all.
    """
    counts = torch.zeros(2**16, dtype=torch.int64)
    for magnitude_P in pieces:
        if dtype is not torch.float32:
            keys = magnitude_P.to(dtype).view(torch.int16).long()
        else:
            bits = magnitude_P.view(torch.int32).long()
            keys = bits >> 16 if within is None else bits[bits >> 16 == within] & 0xFFFF
        counts += torch.bincount(keys, minlength=2**16).cpu()
    return _occupied(counts.numpy())


def count_magnitudes(
    base_P: torch.Tensor, source_P: torch.Tensor, dtype: torch.dtype, within: int | None = None
) -> Histogram:
    """Count the magnitudes of a task vector; in C where that is possible.

    Args:
        base_P: The base.
        source_P: The parent.
        dtype: As for `count_keys`.
        within: As for `count_keys`.
    """
    found = native_statistics.counts(base_P, [source_P], 0, dtype, within)
    if found is not None:
        return _occupied(found)
    pieces = (piece_P.abs_() for [piece_P] in delta_pieces(base_P, [source_P]))
    return count_keys(pieces, dtype, within)


def count_numbers(
    base_P: torch.Tensor,
    source_MP: Sequence[torch.Tensor],
    what: Hashable,
    magnitude: Callable[[Deltas], torch.Tensor],
    within: int | None = None,
) -> Histogram:
    """Count the numbers that an expression makes of task vectors; in C where that has it.

    Args:
        base_P: The base.
        source_MP: The parents.
        what: Names the expression.
        magnitude: From a piece of all task vectors to a float32 tensor of its length, without
            negative numbers.
        within: As for `count_keys`, whose dtype is float32.
    """
    if what == "spread":
        spread = native_statistics.SPREAD
        found = native_statistics.counts(base_P, source_MP, spread, torch.float32, within)
        if found is not None:
            return _occupied(found)
    values = map(magnitude, delta_pieces(base_P, source_MP))
    return count_keys(values, torch.float32, within)


def key_at(rank: int, dtype: torch.dtype, counts: Callable[[int | None], Histogram]) -> int:
    """Return the key of the rank-th largest element (from 1).

    Args:
        rank: From 1 to the number of elements.
        dtype: What the elements were rounded to.
        counts: Gives the histogram of all elements, or `within` one bin; see `count_keys`.
    """
    key, num_larger = counts(None).key_at(rank)
    if dtype is not torch.float32:
        return key
    low, _ = counts(key).key_at(rank - num_larger)
    return key << 16 | low


def added(histograms: Iterable[Histogram]) -> Histogram:
    """Return the histogram of the elements of several, whose keys are of one kind."""
    counts = np.zeros(2**16, dtype=np.int64)
    for histogram in histograms:
        counts[histogram.keys] += np.diff(histogram.counts, prepend=0)
    return _occupied(counts)


def _occupied(counts: np.ndarray) -> Histogram:
    found = counts.nonzero()[0][::-1]
    return Histogram(found.astype(np.int32), counts[found].cumsum())


def smallest_with(key: int, dtype: torch.dtype) -> float:
    """Return the smallest float32 magnitude that has a key of a dtype."""
    return _float32(key) if dtype is torch.float32 else smallest_rounding_to(key, dtype)


def smallest_rounding_to(key: int, dtype: torch.dtype) -> float:
    """Return the smallest float32 that rounds to a 16-bit float (to nearest, ties to even).

    Args:
        key: Bits of the 16-bit number, which is not negative.
        dtype: `torch.bfloat16` or `torch.float16`.
    """
    if key == 0:
        return 0.0
    # half-way to the number below; that itself rounds to whichever of the two is even
    if dtype is torch.bfloat16:
        return _float32((key << 16) - 0x8000 + (key & 1))
    middle = np.float32((_float16(key - 1) + _float16(key)) / 2)
    return float(np.nextafter(middle, np.float32(np.inf)) if key & 1 else middle)


def _float16(bits: int) -> float:
    if bits == 0x7C00:  # infinity: what the next power of two rounds to
        return 65536.0
    return float(np.uint16(bits).view(np.float16))


def _float32(bits: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value
