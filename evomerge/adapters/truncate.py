"""The nearest product of a lower rank, and how far it is.

The largest singular values of `scale * B @ A`, found without the product: B = Q_b R_b and
A^T = Q_a R_a, so its singular values are those of the small `scale * R_b R_a^T`. Nearest in the
Frobenius norm (Eckart & Young 1936, https://doi.org/10.1007/BF02288367). Letters: as in
`adapter.py`; K the lower rank.
"""

from typing import NamedTuple

import torch

from evomerge.adapters.adapter import LowRank


class Residual(NamedTuple):
    """What a truncation leaves out, in the Frobenius norm.

    Attributes:
        absolute: Root of the sum of the squared singular values left out.
        relative: That, divided by the norm of the whole; 0 where the whole is 0.
    """

    absolute: float
    relative: float


def truncate(part: LowRank, rank: int) -> tuple[LowRank, Residual]:
    """Return the nearest product of at most a rank; computed in float64, rounded to float32.

    Args:
        part: What is added to a tensor. Returned as it is where its rank is no larger.
        rank: At least 1.

    Returns:
        Factors with scale 1 and equal norms, and the residual, rounding not counted.
    """
    if part.rank <= rank:
        return part, Residual(0.0, 0.0)
    q_b, r_b = torch.linalg.qr(part.b_OR.double())
    q_a, r_a = torch.linalg.qr(part.a_RI.double().T)
    u, sigma, vt = torch.linalg.svd(part.scale * r_b @ r_a.T, full_matrices=False)
    root_K = sigma[:rank].sqrt()
    a_KI = (root_K[:, None] * (vt[:rank] @ q_a.T)).float()
    b_OK = ((q_b @ u[:, :rank]) * root_K).float()
    left_out, whole = float(sigma[rank:].norm()), float(sigma.norm())
    kept = LowRank(part.module, a_KI, b_OK, 1.0, part.transposed, part.embedding)
    return kept, Residual(left_out, left_out / whole if whole else 0.0)
