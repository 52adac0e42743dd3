"""Sums over task vectors in float64, in one order of additions however they are made.

Each piece of `PIECE` elements is added up by halving it, and the pieces' sums are added exactly.
In C where that is possible; torch's way is the definition. Letters: M models, P elements.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from evomerge.kernels import native_statistics
from evomerge.kernels.native_statistics import PIECE
from evomerge.kernels.reference import delta, kept_deltas, ranges
from evomerge.kernels.tables import Fused, Mask

Deltas = Sequence[torch.Tensor]
"""The task vectors, or a piece of each, as float32."""


def tree_sum(value_P: torch.Tensor) -> float:
    """Add up a float64 tensor by halving it: the order of additions depends on its length alone."""
    while (size := len(value_P)) > 1:
        half = (size + 1) // 2
        folded_P = value_P[:half].clone()
        folded_P[: size - half] += value_P[half:]
        value_P = folded_P
    return float(value_P.sum())


def delta_pieces(
    base_P: torch.Tensor | None, source_MP: Sequence[torch.Tensor]
) -> Iterator[list[torch.Tensor]]:
    """Yield consecutive pieces of all task vectors, or sources, as new float32 tensors."""
    for start, stop in ranges(len(source_MP[0]), PIECE):
        if base_P is None:
            yield [source_P[start:stop].float() for source_P in source_MP]
        else:
            piece_P = base_P[start:stop].float()
            yield [delta(source_P[start:stop], piece_P) for source_P in source_MP]


def term_sums(
    base_P: torch.Tensor,
    source_MP: Sequence[torch.Tensor],
    terms: Callable[[Deltas], Sequence[torch.Tensor]],
    fused: Fused | None = None,
) -> tuple[float, ...]:
    """Return the sums over all elements of the tensors that an expression makes.

    Args:
        base_P: The base.
        source_MP: The parents.
        terms: From a piece of all task vectors to float64 tensors of its length.
        fused: The same by its name, where C may have it.
    """
    found = fused and native_statistics.term_sums(base_P, source_MP, fused)
    if found:
        return found
    parts = [map(tree_sum, terms(delta_MP)) for delta_MP in delta_pieces(base_P, source_MP)]
    return tuple(math.fsum(part) for part in zip(*parts, strict=True))


def gram(
    base_P: torch.Tensor | None, source_MP: Sequence[torch.Tensor]
) -> tuple[tuple[float, ...], ...]:
    """Return the inner products of base and task vectors, or without a base of the sources."""
    found = native_statistics.gram(base_P, source_MP)
    if found is not None:
        return found
    size = len(source_MP) + (base_P is not None)
    parts: dict[tuple[int, int], list[float]] = {
        (i, j): [] for i in range(size) for j in range(i, size)
    }
    for vector_MP, (start, stop) in zip(
        delta_pieces(base_P, source_MP), ranges(len(source_MP[0]), PIECE), strict=True
    ):
        rows = [vector_P.double() for vector_P in vector_MP]
        if base_P is not None:
            rows.insert(0, base_P[start:stop].double())
        for (i, j), part in parts.items():
            part.append(tree_sum(rows[i] * rows[j]))
    sums = {pair: math.fsum(part) for pair, part in parts.items()}
    return tuple(tuple(sums[min(i, j), max(i, j)] for j in range(size)) for i in range(size))


def l1_norms(
    mask: Mask, base_P: torch.Tensor, source_MP: Sequence[torch.Tensor], models: Sequence[int]
) -> tuple[float, ...]:
    """Return what a mask leaves of the L1 norms of some task vectors.

    Args:
        mask: What is kept; how it is scaled and summed is not looked at.
        base_P: The base.
        source_MP: All parents.
        models: Positions of those whose norms are wanted, ascending; at least one.
    """
    found = native_statistics.l1_norms(mask, base_P, source_MP, models)
    if found is not None:
        return found
    parts: list[list[float]] = [[] for _ in source_MP]
    for start, stop in ranges(len(base_P), PIECE):
        piece_P = base_P[start:stop].float()
        sources = [source_P[start:stop] for source_P in source_MP]
        for part, kept_P in zip(parts, kept_deltas(mask, piece_P, sources, start), strict=True):
            part.append(tree_sum(kept_P.abs_().double()))
    return tuple(math.fsum(parts[model]) for model in models)
