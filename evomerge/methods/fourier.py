"""Fourier: the base plus a weighted sum of task vectors without their low frequencies.

Zheng 2024, "FREE-Merging", https://arxiv.org/abs/2411.16815, section 4.1 (its FR-Merging; without
the experts that are added at inference). Matrices are transformed in two dimensions, vectors in
one, other tensors over their last two. Works on whole tensors.

Caution: the order of a weight matrix's rows and columns is arbitrary, and another order has other
frequencies. The method makes sense for fine-tunes of one base only, and should be compared with
`dare_linear` at the same share of kept norm before anything is concluded from it.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from evomerge.config.params import Param
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Whole
from evomerge.methods.method import LAMBDA, WEIGHT, Method, Values

Filter = Callable[[torch.Tensor], torch.Tensor]


def table(values: Values, statistics: TensorStatistics) -> Whole:
    """Return the merge of the whole tensor; filtered task vectors are kept for other candidates."""
    cutoff, keep_norm = float(values.shared["cutoff"]), bool(values.shared["keep_norm"])
    lam = values.shared["lambda"]
    scales = tuple(lam * weight for weight in values.per_model["weight"])
    key, variant = ("fourier", statistics.name, statistics.base), (cutoff, keep_norm)
    keeps = [
        partial(statistics.cache.tensor, (*key, model), variant) for model in statistics.models
    ]
    run = partial(_add, keeps=keeps, scales=scales, cutoff=cutoff, keep_norm=keep_norm)
    return Whole(run, statistics.full_shape)


def _add(
    base: torch.Tensor | None,
    sources: Sequence[torch.Tensor],
    *,
    keeps: Sequence[Callable[[Callable[[], torch.Tensor]], torch.Tensor]],
    scales: tuple[float, ...],
    cutoff: float,
    keep_norm: bool,
) -> torch.Tensor:
    assert base is not None, "task vectors start at a base"
    total = torch.zeros_like(base)
    for source, scale, keep in zip(sources, scales, keeps, strict=True):
        total += keep(partial(_filtered, base, source, cutoff, keep_norm)) * scale
    return total.add_(base)


def _filtered(
    base: torch.Tensor, source: torch.Tensor, cutoff: float, keep_norm: bool
) -> torch.Tensor:
    delta = source.double() - base
    passed = high_pass(delta, cutoff)
    left = float(passed.norm())
    if keep_norm and left > 0:
        passed *= float(delta.norm()) / left
    return passed.float()


def high_pass(delta: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Return a tensor without the frequencies inside an ellipse around 0.

    Args:
        delta: float64.
        cutoff: Radius of the ellipse in units of the highest frequency of each dimension; what lies
            on it is kept. 0 keeps everything, the square root of 2 and more keeps almost nothing.
    """
    dims = tuple(range(max(0, delta.dim() - 2), delta.dim()))
    sizes = [delta.shape[dim] for dim in dims]
    # frequencies in cycles per element reach 1/2
    squares = [(2.0 * torch.fft.fftfreq(size, dtype=torch.float64)).square() for size in sizes[:-1]]
    squares.append((2.0 * torch.fft.rfftfreq(sizes[-1], dtype=torch.float64)).square())
    radius = squares[-1] if len(squares) == 1 else squares[0][:, None] + squares[1]
    spectrum = torch.fft.rfftn(delta, dim=dims)
    # a hair less, so that rounding does not cut what lies on the ellipse
    spectrum *= (radius >= cutoff**2 * (1.0 - 1e-9)).to(spectrum.device)
    return torch.fft.irfftn(spectrum, s=sizes, dim=dims)


METHOD = Method(
    name="fourier",
    summary="base plus a weighted sum of task vectors without their low frequencies",
    source="https://arxiv.org/abs/2411.16815",
    params=(
        WEIGHT,
        LAMBDA,
        Param(
            "cutoff",
            "radius of the frequencies left out; 1 is the highest frequency of a row or column",
            default=0.1,
            per_model=False,
            low=0.0,
            high=1.5,
            search=(0.0, 0.5),
        ),
        Param(
            "keep_norm",
            "scale each filtered task vector back to the norm it had",
            default=False,
            per_model=False,
            kind="bool",
        ),
    ),
    table=table,
    base="required",
)
