"""Placement: the knobs of one entry of the `space:` section, and what each of them sets."""

from dataclasses import dataclass, replace
from typing import Literal

from evomerge.config.params import Param
from evomerge.config.space import LayerScope, SpaceEntry
from evomerge.space.check import choices_of, is_whole
from evomerge.space.cover import Cover, Models
from evomerge.space.knobs import Knob
from evomerge.space.layers import group_names, layer_groups

Spread = Literal["same", "steps", "curve"]
"""One value for all layers, steps from layer to layer, or a curve between knots."""


@dataclass(frozen=True)
class Placement:
    """Where the knobs of one entry go, for one parent.

    Attributes:
        parameter: Name of the method's parameter.
        parent: Name of the parent whose value it is; None when all share it.
        filter: Part of tensor names; None is every tensor that no placement before it governs.
        spread: How the value varies over the layers.
        knobs: Positions in the space: one; one for each layer; or one for each knot.
        outside: Each tensor outside the layers that is set by name, and its knob's position.
    """

    parameter: str
    parent: str | None
    filter: str | None
    spread: Spread
    knobs: tuple[int, ...]
    outside: tuple[tuple[str, int], ...] = ()


def place(
    param: Param, entry: SpaceEntry, cover: Cover, models: Models, first: int
) -> tuple[list[Knob], Placement]:
    """Return the knobs of an entry for one parent, and where they go.

    Args:
        param: The method's declaration.
        entry: An entry without problems.
        cover: The tensors it governs.
        models: Parents and layers.
        first: Position of its first knob in the space.
    """
    spread, names, knobs = _over_layers(entry, models.layout.num_layers)
    outside = []
    for role, tensor in cover.outside if spread != "same" else ():
        if entry.outside == "own" and role not in names:
            names.append(role)
        tied = knobs[0] if role == "embed" else knobs[-1]
        outside.append((tensor, first + (names.index(role) if entry.outside == "own" else tied)))
    placement = Placement(
        parameter=param.name,
        parent=cover.parent,
        filter=entry.filter,
        spread=spread,
        knobs=tuple(first + knob for knob in knobs),
        outside=tuple(outside),
    )
    stem = (param.name, cover.parent, entry.filter)
    made = [_knob(_joined(*stem, name), param, entry, len(models.parents)) for name in names]
    return made, placement


def _over_layers(entry: SpaceEntry, num_layers: int) -> tuple[Spread, list[str], list[int]]:
    """Return the spread, the knobs' names, and the knob of each layer (of each knot for curves)."""
    groups = layer_groups(entry.scope, num_layers)
    if groups:
        sizes = [last + 1 - first for first, last in groups]
        of_layers = [knob for knob, size in enumerate(sizes) for _ in range(size)]
        return "steps", list(group_names(groups, num_layers)), of_layers
    if isinstance(entry.scope, LayerScope) and entry.scope.curve is not None:
        knots = list(range(entry.scope.curve))
        return "curve", [f"knot_{knot}" for knot in knots], knots
    return "same", [""], [0]


def _joined(*parts: str | None) -> str:
    return ".".join(part for part in parts if part)


def _knob(name: str, param: Param, entry: SpaceEntry, num_parents: int) -> Knob:
    blank = _blank_knob(name, param, entry)
    start = entry.initial
    even = 1 / num_parents
    if start is None and param.name == "weight" and blank.kind == "float":
        start = even if blank.low <= even <= blank.high else None
    return replace(blank, initial=blank.value(0.5 if start is None else blank.unit(start)))


def _blank_knob(name: str, param: Param, entry: SpaceEntry) -> Knob:
    choices = choices_of(param, entry)
    if choices:
        last = len(choices) - 1
        return Knob(name, "choice", 0, last, choices[0], choices=choices, sigma=entry.sigma)
    ends = entry.search or param.search
    assert ends is not None, "an entry without a range is refused before"
    low, high = ends
    if is_whole(param, entry):
        return Knob(name, "int", int(low), int(high), int(low), entry.scale, sigma=entry.sigma)
    return Knob(name, "float", low, high, low, entry.scale, sigma=entry.sigma)
