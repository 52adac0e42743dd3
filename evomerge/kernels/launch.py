"""Launch: many tensors merged in one call. What implementations of the kernels take and tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from evomerge.kernels.masks import MaskKey
from evomerge.kernels.tables import KernelTable


@dataclass(frozen=True)
class KernelJob:
    """One tensor of a launch, or a run of its elements: M models, P elements.

    Attributes:
        table: What to do.
        base_P: The base's elements, flat and contiguous, in their stored dtype; None where the
            table has no base.
        source_MP: The same of the M sources. Not written to.
        out_P: Flat and contiguous, of any floating dtype. Every element is written.
        dither: What the result is rounded at random for; only for bfloat16. None rounds to nearest.
        first: Index of the first of these elements in the whole tensor; a multiple of 8. 0 where
            the table is a `Whole`.
    """

    table: KernelTable
    base_P: torch.Tensor | None
    source_MP: Sequence[torch.Tensor]
    out_P: torch.Tensor
    dither: MaskKey | None = None
    first: int = 0


class Written(NamedTuple):
    """What a launch tells of one tensor that it wrote.

    Attributes:
        checksum: Of its bits; see `checksums.tensor_checksum`. Those of the runs of a tensor add up
            to the tensor's, modulo 2**64.
        is_finite: Whether it holds neither NaN nor Inf.
    """

    checksum: int
    is_finite: bool
