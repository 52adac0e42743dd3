"""PCB: weigh every element of the task vectors by how it competes within and between them.

Du 2024, "Parameter competition balancing for model merging", https://arxiv.org/abs/2410.02396.
With Norm(x) = (x - min) / (max - min) and Softmax over the elements of the tensor, the
score of the i-th of M task vectors d_i is

    Softmax(M Norm(d_i d_i)) * sum_j Softmax(Norm(d_i d_j)),

of which the largest `density` are kept and the others set to 0; the merge is the base plus the
mean of the task vectors weighted by these scores, element by element. Our choices: the paper's
elements are those of a whole model, ours of one tensor; Norm, which the paper leaves open, is that
of the authors' code; j runs over all models, i among them; where all products are equal Norm is 0.
The authors' code departs from the paper (it squares Norm, and takes a hyperbolic tangent for the
second factor). Kernel: local, with scores in float64.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from evomerge.config.params import Param
from evomerge.kernels.reference import delta
from evomerge.kernels.statistics import Deltas, TensorStatistics
from evomerge.kernels.tables import Local
from evomerge.methods.method import LAMBDA, WEIGHT, Method, Values

Pair = tuple[int, int]
"""Positions of two models, or of one twice, the smaller first."""

TERMS = 12
"""Order of the Taylor series of the exponential at up to 1/4; what follows is below 1e-17."""


@dataclass(frozen=True)
class Softmaxes:
    """The softmaxes over one tensor, as far as they depend on all of its elements.

    Attributes:
        spans: For each pair the smallest product of the two task vectors, and the inverse of how
            far the largest lies above it (0 where all are equal).
        within: For each model the mean of what is in its first softmax.
        between: For each pair the mean of what is in its softmax.
    """

    spans: Mapping[Pair, tuple[float, float]]
    within: tuple[float, ...] = ()
    between: Mapping[Pair, float] = field(default_factory=dict)


def table(values: Values, statistics: TensorStatistics) -> Local:
    """Return the expression with what scores need, and the score from which each model counts."""
    softmaxes = statistics.fact("softmaxes", lambda: _softmaxes(statistics))
    density, lam = float(values.shared["density"]), values.shared["lambda"]
    thresholds = tuple(
        _threshold(statistics, softmaxes, model, density) for model in range(len(statistics.models))
    )
    weights = tuple(lam * weight for weight in values.per_model["weight"])
    return Local(partial(balanced, softmaxes=softmaxes, thresholds=thresholds, weights=weights))


def balanced(
    base: torch.Tensor | None,
    sources: Sequence[torch.Tensor],
    softmaxes: Softmaxes,
    thresholds: tuple[float, ...],
    weights: tuple[float, ...],
) -> torch.Tensor:
    """Return base plus the mean of the task vectors by their scores; see `tables.Expression`."""
    assert base is not None, "pcb starts from a base"
    deltas = [delta(source, base) for source in sources]
    merged, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for model, task_vector in enumerate(deltas):
        score = scores(deltas, softmaxes, model)
        score.mul_(score >= thresholds[model])
        divisor.add_(score)
        merged.add_(score.mul_(task_vector).mul_(weights[model]))
    return merged.div_(divisor.add_(divisor == 0)).add_(base)


def scores(deltas: Deltas, softmaxes: Softmaxes, model: int) -> torch.Tensor:
    """Return the scores of a model's task vector, as a new float32 tensor.

    In units of a score that all elements of all models would have alike, but for the number of
    models.
    """
    total = torch.zeros_like(deltas[model], dtype=torch.float64)
    for other in range(len(deltas)):
        pair = min(model, other), max(model, other)
        term = exponential(_norm(deltas, softmaxes, pair))
        total.add_(term.mul_(1.0 / softmaxes.between[pair]))
    own = exponential(_norm(deltas, softmaxes, (model, model)), len(deltas))
    return total.mul_(own.mul_(1.0 / softmaxes.within[model])).float()


def exponential(value: torch.Tensor, factor: int = 1) -> torch.Tensor:
    """Return exp(factor * value) for float64 numbers in [0, 1], by sums and products alone.

    Those are the same everywhere, while the last bits of a library's exponential may depend on the
    processor, and on where in the tensor an element stands.
    """
    quarter = value * 0.25
    total = torch.full_like(value, 1.0 / math.factorial(TERMS))
    for order in reversed(range(TERMS)):
        total.mul_(quarter).add_(1.0 / math.factorial(order))
    power = total.square_().square_()
    result = power.clone()
    for _ in range(factor - 1):
        result.mul_(power)
    return result


def _norm(deltas: Deltas, softmaxes: Softmaxes, pair: Pair) -> torch.Tensor:
    lowest, inverse = softmaxes.spans[pair]
    return _product(deltas, pair).sub_(lowest).mul_(inverse)


def _product(deltas: Deltas, pair: Pair) -> torch.Tensor:
    # float64 holds the product of two float32 numbers exactly
    return deltas[pair[0]].double() * deltas[pair[1]].double()


def _softmaxes(statistics: TensorStatistics) -> Softmaxes:
    num_models, size = len(statistics.models), len(statistics.source_MP[0])
    pairs = [(i, j) for i in range(num_models) for j in range(i, num_models)]
    lowest, highest = dict.fromkeys(pairs, math.inf), dict.fromkeys(pairs, -math.inf)
    for deltas in statistics.pieces():
        for pair in pairs:
            product = _product(deltas, pair)
            lowest[pair] = min(lowest[pair], float(product.min()))
            highest[pair] = max(highest[pair], float(product.max()))
    widths = {pair: highest[pair] - lowest[pair] for pair in pairs}
    inverses = {pair: 1.0 / width if width > 0 else 0.0 for pair, width in widths.items()}
    spans = {pair: (lowest[pair], inverses[pair]) for pair in pairs}
    sums = statistics.sums(partial(_exponentials, softmaxes=Softmaxes(spans)))
    means = tuple(total / size for total in sums)
    between = dict(zip(pairs, means[num_models:], strict=size > 0))
    return Softmaxes(spans, means[:num_models], between)


def _exponentials(deltas: Deltas, softmaxes: Softmaxes) -> list[torch.Tensor]:
    """Return what the softmaxes are over: first each model's, then each pair's."""
    num_models = len(deltas)
    within = [exponential(_norm(deltas, softmaxes, (i, i)), num_models) for i in range(num_models)]
    return within + [exponential(_norm(deltas, softmaxes, pair)) for pair in softmaxes.spans]


def _threshold(
    statistics: TensorStatistics, softmaxes: Softmaxes, model: int, density: float
) -> float:
    """Return the smallest score kept: 0 for all, infinity for none."""
    size = len(statistics.source_MP[0])
    if density >= 1 or size == 0:
        return 0.0
    if density <= 0:
        return math.inf
    score = partial(scores, softmaxes=softmaxes, model=model)
    return statistics.largest(("score", model), max(1, int(density * size)), score)


METHOD = Method(
    name="pcb",
    summary="mean of the task vectors by how their elements compete",
    source="https://arxiv.org/abs/2410.02396",
    params=(
        dataclasses.replace(WEIGHT, default=1.0),
        Param(
            name="density",
            meaning="share of every task vector, by score, that is kept",
            default=1.0,
            per_model=False,
            low=0.0,
            high=1.0,
            search=(0.1, 1.0),
        ),
        LAMBDA,
    ),
    table=table,
    base="required",
    min_parents=2,
)
