"""Model Stock: from the base towards the mean of the models, as far as their angles advise.

Jang 2024, https://arxiv.org/abs/2403.19522, section 4. Where task vectors are alike the mean is
taken, where they stand at right angles the base. Kernel: span over the task vectors; with
`filter_wise`, each row has its own position. Letters: M models.
"""

import itertools
import math
from collections.abc import Sequence

import torch

from evomerge.config.params import Param
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Span, Whole
from evomerge.methods.method import Method, Values

SMALL_PRODUCT = 1e-6
"""Product of two task vectors' norms below which it counts as this number: they have no angle."""

SINGULAR = 1e-6
"""Size of the divisor below which no position follows, and the base is left as it is."""


def table(values: Values, statistics: TensorStatistics) -> Span | Whole:
    """Return one coefficient for all task vectors, or the merge row by row."""
    if values.shared["filter_wise"]:
        return Whole(by_rows, statistics.full_shape)
    gram = statistics.gram()
    num_models = len(gram) - 1
    cosines = [
        gram[i][j] / max(math.sqrt(gram[i][i] * gram[j][j]), SMALL_PRODUCT)
        for i, j in itertools.combinations(range(1, num_models + 1), 2)
    ]
    cosine = math.fsum(cosines) / len(cosines)
    divisor = 1.0 + (num_models - 1) * cosine
    t = num_models * cosine / divisor if abs(divisor) >= SINGULAR else 0.0
    return Span((t / num_models,) * num_models, base=1.0, deltas=True)


def by_rows(base: torch.Tensor | None, sources: Sequence[torch.Tensor]) -> torch.Tensor:
    """Merge float32 tensors with a position of its own for each vector along the last dimension."""
    assert base is not None, "Model Stock starts at a base"
    deltas = [source - base for source in sources]
    norms = [d.square().sum(-1, dtype=torch.float64, keepdim=True).sqrt_() for d in deltas]
    num_models = len(deltas)
    cosine = torch.zeros_like(norms[0])
    pairs = list(itertools.combinations(range(num_models), 2))
    for i, j in pairs:
        product = (deltas[i] * deltas[j]).sum(-1, dtype=torch.float64, keepdim=True)
        cosine += product / (norms[i] * norms[j]).clamp_min_(SMALL_PRODUCT) / len(pairs)
    divisor = 1.0 + (num_models - 1) * cosine
    regular = divisor.abs() >= SINGULAR
    t = torch.where(regular, num_models * cosine / torch.where(regular, divisor, 1.0), 0.0)
    total = deltas[0]
    for delta in deltas[1:]:
        total.add_(delta)
    return total.mul_((t / num_models).float()).add_(base)


METHOD = Method(
    name="model_stock",
    summary="from the base towards the mean of the models, by the angles of their task vectors",
    source="https://arxiv.org/abs/2403.19522",
    params=(
        Param(
            "filter_wise",
            "a position for each row instead of one for the whole tensor",
            default=False,
            per_model=False,
            kind="bool",
        ),
    ),
    table=table,
    base="required",
    min_parents=2,
)
