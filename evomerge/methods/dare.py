"""DARE: drop random elements of the task vectors and scale up the rest; then sum, plain or by TIES.

Yu 2023, https://arxiv.org/abs/2311.03099. Survivors are scaled to the L1 norm of the whole task
vector, as mergekit does; `rescale_by_density` divides them by the density, as in the paper. Kernel:
mask by random numbers.
"""

import dataclasses
from functools import partial

from evomerge.config.params import Param
from evomerge.kernels.masks import keep_level
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Mask
from evomerge.methods.method import (
    DENSITY,
    INT8_MASK,
    LAMBDA,
    WEIGHT,
    Method,
    Values,
    finished,
    normalize,
    rescale,
)


def table(values: Values, statistics: TensorStatistics, elect: bool) -> Mask:
    """Return each rescaled weight, and the share of random numbers that keeps the density."""
    weights = values.per_model["weight"]
    levels, factors = values.once(_levels_and_factors)
    kept = Mask(weights, weights, (0.0,) * len(weights), levels, statistics.mask_key)
    return finished(kept, values, statistics, elect, factors)


def _levels_and_factors(values: Values) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    """Return each keep level, and what `rescale_by_density` multiplies by; None without it."""
    densities = values.per_model["density"]
    levels = tuple(map(keep_level, densities))
    if not values.shared["rescale_by_density"]:
        return levels, None
    return levels, tuple(1.0 / density if density > 0 else 1.0 for density in densities)


def two_ways_to_rescale(values: Values) -> str | None:
    """Refuse to rescale by density where rescaling is switched off."""
    if values.shared["rescale_by_density"] and not values.shared["rescale"]:
        return (
            "rescale_by_density is true and rescale is false, and the first says how the second is "
            "done. Set both to true, or rescale_by_density to false."
        )
    return None


LINEAR = Method(
    name="dare_linear",
    summary="random elements of the task vectors, rescaled, in a weighted sum",
    source="https://arxiv.org/abs/2311.03099",
    params=(
        WEIGHT,
        DENSITY,
        LAMBDA,
        normalize(False),
        rescale(True),
        Param(
            name="rescale_by_density",
            meaning="rescale by dividing by the density, not to the L1 norm",
            default=False,
            per_model=False,
            kind="bool",
        ),
        INT8_MASK,
    ),
    table=partial(table, elect=False),
    base="required",
    random_masks=True,
    refuse=two_ways_to_rescale,
)

TIES = dataclasses.replace(
    LINEAR,
    name="dare_ties",
    summary="random elements of the task vectors, rescaled, summed where signs agree",
    table=partial(table, elect=True),
)
