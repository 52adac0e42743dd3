"""DELLA: drop random elements of the task vectors, large ones less often; then sum, or as TIES.

Deep 2024, "DELLA-Merging", https://arxiv.org/abs/2406.11617. The chance of being kept grows from
density - epsilon for the smallest element of a row to density + epsilon for the largest, in even
steps of the rank. Survivors are scaled to the L1 norm of the whole task vector, as mergekit does,
and not by their own chances as in the paper. Kernel: mask by random numbers and ranks.
"""

import dataclasses
from functools import partial

import torch

from evomerge.config.params import Param
from evomerge.kernels.masks import KEEP_ALL, keep_level
from evomerge.kernels.ranks import HIGHEST
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
    """Return each rescaled weight, and the shares of random numbers that keep each rank."""
    weights = values.per_model["weight"]
    levels, steps = values.once(_lines)
    kept = Mask(
        scales=weights,
        weights=weights,
        thresholds=(0.0,) * len(weights),
        keep_levels=levels,
        key=statistics.mask_key,
        rank_steps=steps,
        ranks=_ranks(steps, statistics),
    )
    return finished(kept, values, statistics, elect)


def _lines(values: Values) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return each model's level of the lowest rank, and what each rank adds to it."""
    pairs = zip(values.per_model["density"], values.per_model["epsilon"], strict=True)
    lines = [_line(density, epsilon) for density, epsilon in pairs]
    return tuple(level for level, _ in lines), tuple(step for _, step in lines)


def _ranks(steps: tuple[int, ...], statistics: TensorStatistics) -> tuple[torch.Tensor | None, ...]:
    """Return the ranks of each model whose step reads them."""
    if all(steps):
        return statistics.all_ranks()
    return tuple(statistics.ranks(i) if step else None for i, step in enumerate(steps))


def _line(density: float, epsilon: float) -> tuple[int, int]:
    """Return the level of the lowest rank, and what each rank adds to it."""
    if density <= 0 or density >= 1:
        return keep_level(density), 0
    return max(1, keep_level(density - epsilon)), int(2 * epsilon * KEEP_ALL / HIGHEST)


def chances_out_of_range(values: Values) -> str | None:
    """Refuse chances of being kept that are not between 0 and 1."""
    pairs = zip(values.per_model["density"], values.per_model["epsilon"], strict=True)
    for density, epsilon in pairs:
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            return (
                f"density {density} and epsilon {epsilon} keep elements with chances from "
                f"{density - epsilon:g} to {density + epsilon:g}, which must lie between 0 and 1. "
                "Use a smaller epsilon, or a density nearer to 0.5."
            )
    return None


TIES = Method(
    name="della",
    summary="random elements of the task vectors, large ones rather, summed where signs agree",
    source="https://arxiv.org/abs/2406.11617",
    params=(
        WEIGHT,
        # with the range of epsilon, every chance lies between 0 and 1
        dataclasses.replace(DENSITY, search=(0.25, 0.75)),
        Param(
            name="epsilon",
            meaning="how far the chances of being kept of this model's elements lie from density",
            default=0.15,
            per_model=True,
            low=0.0,
            high=0.5,
            search=(0.0, 0.2),
        ),
        LAMBDA,
        normalize(True),
        rescale(True),
        INT8_MASK,
    ),
    table=partial(table, elect=True),
    base="required",
    random_masks=True,
    refuse=chances_out_of_range,
)

LINEAR = dataclasses.replace(
    TIES,
    name="della_linear",
    summary="random elements of the task vectors, large ones rather, in a weighted sum",
    params=tuple(p if p.name != "normalize" else normalize(False) for p in TIES.params),
    table=partial(table, elect=False),
)
