"""Linear: a weighted mean of the models themselves.

Wortsman 2022, "Model soups", https://arxiv.org/abs/2203.05482. Kernel: span over the models, the
weights divided by their sum as coefficients.
"""

import dataclasses

from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Span
from evomerge.methods.method import WEIGHT, Method, Values, divisor, normalize


def table(values: Values, statistics: TensorStatistics) -> Span:
    """Return the weights as coefficients, divided by their sum where `normalize` is set."""
    return values.once(_span)


def _span(values: Values) -> Span:
    total = divisor(values)
    return Span(tuple(weight / total for weight in values.per_model["weight"]))


def weights_cancel(values: Values) -> str | None:
    """Refuse weights that add up to nothing: they have no mean, and there is no base."""
    weights = values.per_model["weight"]
    if values.shared["normalize"] and abs(sum(weights)) < 1e-8:
        return f"the weights {weights} add up to 0. Change them, or set normalize: false."
    return None


METHOD = Method(
    name="linear",
    summary="weighted mean of the models",
    source="https://arxiv.org/abs/2203.05482",
    params=(
        dataclasses.replace(WEIGHT, meaning="share of this model in the mean"),
        normalize(True),
    ),
    table=table,
    base="listed",
    refuse=weights_cancel,
)
