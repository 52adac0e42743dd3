"""Exact sums of adapters, by stacking their factors.

    sum_k w_k s_k B_k A_k = [w_1 s_1 B_1 ... w_K s_K B_K] [A_1; ...; A_K]

A's are never averaged with A's and B's with B's: (sum w_k B_k)(sum w_k A_k) has the products of
every B with every other A in it, and is another model. Letters: as in `adapter.py`; S the sum of
the ranks.
"""

from collections.abc import Mapping, Sequence

import torch

from evomerge.adapters.adapter import Adapter, LowRank


def stack_parts(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank | None:
    """Return the weighted sum of what several adapters add to one tensor, as one product.

    Args:
        parts: What each adds, in any ranks and dtypes.
        weights: A coefficient of any sign for each; with 0 a part takes no rank.

    Returns:
        Factors in float32 with scale 1, each element rounded at most once; None for no parts or
        none but zero weights.
    """
    kept = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    if not kept:
        return None
    first = kept[0][0]
    a_SI = torch.cat([part.a_RI.float() for part, _ in kept])
    b_OS = torch.cat(
        [(weight * part.scale * part.b_OR.double()).float() for part, weight in kept], 1
    )
    return LowRank(first.module, a_SI, b_OS, 1.0, first.transposed, first.embedding)


def stack_adapters(
    adapters: Sequence[Adapter], weights: Mapping[str, Sequence[float]]
) -> dict[str, LowRank]:
    """Return the weighted sum of adapters of one model; they may touch different tensors.

    Replaced tensors (`Adapter.saved`) are not of low rank and take no part.

    Args:
        adapters: The adapters.
        weights: Tensor name to one coefficient per adapter, for each tensor that one of them adds
            to.

    Returns:
        Tensor name to what is added to it, sorted by name.
    """
    stacked = {}
    for name in sorted({name for adapter in adapters for name in adapter.low_rank}):
        found = [
            (adapter.low_rank[name], weight)
            for adapter, weight in zip(adapters, weights[name], strict=True)
            if name in adapter.low_rank
        ]
        part = stack_parts([part for part, _ in found], [weight for _, weight in found])
        if part is not None:
            stacked[name] = part
    return stacked
