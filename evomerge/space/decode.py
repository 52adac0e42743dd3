"""From a genome to the recipe it stands for.

Values are rounded here, once: what is scored is what is exported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evomerge.config.models import DtypeName, ModelRef
from evomerge.config.recipe import (
    Curve,
    Recipe,
    Rounding,
    Rule,
    Setting,
    Source,
    ThresholdTies,
)
from evomerge.config.resolve import curve_at
from evomerge.space.genome import Genome
from evomerge.space.knobs import KnobValue
from evomerge.space.placement import Placement
from evomerge.space.space import Space


@dataclass(frozen=True)
class RecipeTemplate:
    """What every recipe of a search has in common.

    Attributes:
        merge_method: Name of the method.
        base: The base model, None for methods without one. It may be a parent as well (slerp).
        parents: Name and model of each parent, in recipe order.
        shared: Fixed parameters shared by all parents.
        per_model: Fixed parameters that differ: parameter, then parent, then value.
        dtype: Dtype of the arithmetic.
        out_dtype: Dtype of the merged tensors; None is the base's.
        tokenizer_source: As in a recipe.
        mask_seed, threshold_ties, rounding: As in a recipe.
    """

    merge_method: str
    base: ModelRef | None
    parents: tuple[tuple[str, ModelRef], ...]
    shared: Mapping[str, float | bool] = field(default_factory=dict)
    per_model: Mapping[str, Mapping[str, float | bool]] = field(default_factory=dict)
    dtype: DtypeName = "float32"
    out_dtype: DtypeName | None = None
    tokenizer_source: str | None = None
    mask_seed: int = 0
    threshold_ties: ThresholdTies = "keep"
    rounding: Rounding = "nearest"

    def fixed(self, parent: str | None) -> dict[str, float | bool]:
        """Return the fixed parameters of one parent; those that all share for None."""
        if parent is None:
            return dict(self.shared)
        return {name: own[parent] for name, own in self.per_model.items() if parent in own}


def values_of(space: Space, genome: Genome) -> dict[str, KnobValue]:
    """Return the value of each knob by its name, as a trial shows them."""
    return space.values(genome)


def decode(space: Space, genome: Genome, template: RecipeTemplate) -> Recipe:
    """Make the recipe of a genome; the same genome gives the same recipe in every process.

    Every number is on its knob's grid, those between the knots of a curve too. A value that all
    tensors share is a plain number. Others are rules: first those of tensors outside the layers,
    by full name, then those with a filter, then the rest; what varies over the layers has one
    number for each.

    Args:
        space: The search's knobs.
        genome: A point of it.
        template: What all recipes of the search have in common.

    Returns:
        A recipe. Whether it is a merge of the models is for the plan to say.
    """
    values = tuple(map(_as_number, space.values(genome).values()))
    return Recipe(
        merge_method=template.merge_method,
        models=tuple(
            Source(model=model, parameters=_parameters(space, values, template, name))
            for name, model in template.parents
        ),
        base_model=template.base,
        parameters=_parameters(space, values, template, None),
        dtype=template.dtype,
        out_dtype=template.out_dtype,
        tokenizer_source=template.tokenizer_source,
        mask_seed=template.mask_seed,
        threshold_ties=template.threshold_ties,
        rounding=template.rounding,
    )


def _parameters(
    space: Space, values: Sequence[float | bool], template: RecipeTemplate, parent: str | None
) -> dict[str, Setting]:
    """Return the parameters of one parent; those that all share for None."""
    fixed = template.fixed(parent)
    placed: dict[str, list[Placement]] = {}
    for placement in space.placements:
        if placement.parent == parent:
            placed.setdefault(placement.parameter, []).append(placement)
    searched = {
        name: _setting(space, placements, values, fixed.get(name))
        for name, placements in placed.items()
    }
    return {**fixed, **searched}


def _setting(
    space: Space,
    placements: Sequence[Placement],
    values: Sequence[float | bool],
    fixed: float | bool | None,
) -> Setting:
    """Join the placements of one parameter and parent; `fixed` is for what they do not match."""
    only = placements[0]
    if only.filter is None and only.spread == "same":
        return values[only.knobs[0]]
    outside = [
        Rule(filter=tensor, value=values[knob])
        for placement in placements
        for tensor, knob in placement.outside
    ]
    rest = [Rule(filter=p.filter, value=_over_layers(space, p, values)) for p in placements]
    left = [] if fixed is None else [Rule(value=fixed)]
    return (*outside, *rest, *left)


def _as_number(value: KnobValue) -> float | bool:
    return value if isinstance(value, bool) else float(value)


def _over_layers(
    space: Space, placement: Placement, values: Sequence[float | bool]
) -> float | bool | Curve:
    chosen = [values[knob] for knob in placement.knobs]
    if placement.spread == "same":
        return chosen[0]
    if placement.spread == "steps":
        return tuple(chosen)
    on_grid, depth = space.knobs[placement.knobs[0]].on_grid, space.num_layers
    return tuple(on_grid(curve_at(chosen, layer, depth)) for layer in range(depth))
