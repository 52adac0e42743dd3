"""What is wrong with the `space:` section: a sentence for every problem, under its field."""

from collections.abc import Iterator, Mapping, Sequence

from evomerge.config.params import Param
from evomerge.config.space import LayerScope, SpaceEntry
from evomerge.registry import did_you_mean
from evomerge.space.cover import Cover, Fixed, Models, covers
from evomerge.space.knobs import DECIMALS, KnobValue, round_to_grid
from evomerge.space.layers import layer_groups, scope_problem

Problem = tuple[str, str]
"""Field of an entry, and the sentence about it."""


def choices_of(param: Param, entry: SpaceEntry) -> tuple[KnobValue, ...]:
    """Return the listed values an entry chooses from; none when it searches a range."""
    if entry.choices is not None:
        return entry.choices
    return (False, True) if param.kind == "bool" else ()


def is_whole(param: Param, entry: SpaceEntry) -> bool:
    """Return whether an entry searches whole numbers."""
    return "int" in (entry.kind, param.kind)


def entry_problems(param: Param, entry: SpaceEntry, models: Models) -> list[Problem]:
    """Return what is wrong with an entry taken alone."""
    values = _choice_problems if choices_of(param, entry) else _range_problems
    return [
        *values(param, entry),
        *_scope_problems(param, entry, models.layout.num_layers),
        *_parent_problems(param, entry, models.parents),
    ]


def cover_problems(
    param: Param, entries: Sequence[SpaceEntry], models: Models
) -> list[tuple[int, Problem]]:
    """Return what is wrong with the tensors that a parameter's entries govern.

    Each problem comes with the position of its entry.
    """
    found: dict[int, list[Cover]] = {index: [] for index in range(len(entries))}
    for cover in covers(param, entries, models):
        found[cover.index].append(cover)
    return [
        (index, problem)
        for index, entry in enumerate(entries)
        for problem in _reach_problems(entry, found[index], models)
    ]


def fixed_problem(
    param: Param, entries: Sequence[SpaceEntry], fixed: Fixed | None, models: Models
) -> str | None:
    """Return what is wrong with a parameter whose fixed value no tensor would take, or None."""
    whole = {
        parent
        for entry in entries
        if entry.filter is None
        for parent in (entry.models or models.parents)
    }
    given = set(fixed) if isinstance(fixed, Mapping) else set(models.parents)
    never_used = given & whole if isinstance(fixed, Mapping) else given <= whole
    if fixed is None or not never_used:
        return None
    return (
        f"is searched for every tensor, and fixed in merge.parameters.{param.name}. "
        "Remove one of the two, or give the search a filter."
    )


def _choice_problems(param: Param, entry: SpaceEntry) -> Iterator[Problem]:
    choices = choices_of(param, entry)
    if param.kind == "bool" and entry.search is not None:
        yield "search", f"{param.name} is a switch, it has no range. Remove search."
    for choice in choices:
        if isinstance(choice, bool) != (param.kind == "bool"):
            wanted = "true or false" if param.kind == "bool" else "a number"
            yield "choices", f"came {choice!r}, {wanted} is needed."
        elif param.kind == "int" and choice != int(choice):
            yield "choices", f"came {choice!r}, {param.name} takes whole numbers."
        elif param.kind != "bool" and not param.low <= choice <= param.high:
            yield "choices", f"{choice!r} is not legal, {_legal(param)}. Remove it."
    if entry.initial is not None and entry.initial not in choices:
        yield "initial", f"came {entry.initial!r}, allowed is one of {list(choices)}."


def _range_problems(param: Param, entry: SpaceEntry) -> Iterator[Problem]:
    ends = entry.search or param.search
    if ends is None:
        yield (
            "search",
            f"is missing, and {param.name} has no range of its own. Write search: [low, high].",
        )
        return
    if not (param.low <= ends[0] and ends[1] <= param.high):
        yield "search", f"{list(ends)} is not legal, {_legal(param)}. Narrow it."
    if param.kind == "int" and entry.kind == "float":
        yield "kind", f"came 'float', {param.name} takes whole numbers. Remove kind."
    if entry.scale == "log" and ends[0] <= 0:
        yield "scale", f"log needs a lowest value above 0, search is {list(ends)}. Write linear."
    if isinstance(entry.initial, bool):
        yield "initial", f"came {entry.initial!r}, a number is needed."
    elif entry.initial is not None and not ends[0] <= entry.initial <= ends[1]:
        yield "initial", f"came {entry.initial:g}, allowed is {ends[0]:g} to {ends[1]:g}."
    yield from _grid_problems(param, entry, ends)


def _grid_problems(param: Param, entry: SpaceEntry, ends: tuple[float, float]) -> Iterator[Problem]:
    numbers = [("search", end) for end in ends]
    if entry.initial is not None:
        numbers.append(("initial", float(entry.initial)))
    for field, number in numbers:
        if is_whole(param, entry) and number != int(number):
            yield field, f"came {number!r}, a whole number is needed."
        elif not is_whole(param, entry) and round_to_grid(number, entry.scale) != number:
            digits = "significant digits" if entry.scale == "log" else "decimals"
            yield field, f"came {number!r}, recipes keep {DECIMALS} {digits}. Round it."


def _scope_problems(param: Param, entry: SpaceEntry, num_layers: int) -> Iterator[Problem]:
    problem = scope_problem(entry.scope, num_layers)
    if problem is not None:
        yield "scope", problem
    if param.kind == "bool" and entry.scope != "global":
        yield "scope", f"{param.name} is a switch, and layer curves hold numbers. Use filters."
    curve = isinstance(entry.scope, LayerScope) and entry.scope.curve is not None
    if curve and (choices_of(param, entry) or is_whole(param, entry)):
        yield "scope", "a curve passes between its knots, which need kind float. Use groups."


def _parent_problems(param: Param, entry: SpaceEntry, parents: Sequence[str]) -> Iterator[Problem]:
    if entry.models is not None and not param.per_model:
        yield "models", f"{param.name} is shared by all parents. Remove models."
        return
    for name in entry.models or ():
        if name not in parents:
            yield "models", f"no parent is called {name!r}.{did_you_mean(name, parents)}"


def _reach_problems(entry: SpaceEntry, found: Sequence[Cover], models: Models) -> Iterator[Problem]:
    if entry.filter is not None and not any(entry.filter in name for name in models.tensors):
        yield "filter", f"no tensor has {entry.filter!r} in its name. Take a part of a name."
    elif found and not any(cover.tensors for cover in found):
        yield "filter", "every tensor it matches is governed by an entry before it. Put it first."
    elif found and entry.scope != "global":
        yield from _layer_problems(entry, found, models)


def _layer_problems(entry: SpaceEntry, found: Sequence[Cover], models: Models) -> Iterator[Problem]:
    num_layers = models.layout.num_layers
    tensors = [name for cover in found for name in cover.tensors]
    layers = {models.layout.layer_of(name) for name in tensors} - {None}
    if not layers:
        yield "scope", "every tensor it governs lies outside the layers. Write scope: global."
        return
    yield from _outside_problems(entry, found, models)
    if scope_problem(entry.scope, num_layers) is not None:
        return
    for first, last in layer_groups(entry.scope, num_layers):
        if layers.isdisjoint(range(first, last + 1)):
            where = f"layer {first}" if first == last else f"layers {first} to {last}"
            yield "scope", f"no tensor it governs lies in {where}, so that knob sets nothing."


def _outside_problems(
    entry: SpaceEntry, found: Sequence[Cover], models: Models
) -> Iterator[Problem]:
    outside = list(dict.fromkeys(name for cover in found for _, name in cover.outside))
    if outside and entry.outside is None:
        yield (
            "outside",
            f"is missing, and {', '.join(outside)} belong to no layer. Write own (a knob for each "
            "role) or tied (embeddings to the first layer, norm and head to the last).",
        )
    elif entry.outside is not None and not outside:
        yield "outside", "governs no tensor outside the layers. Remove it."
    for name in outside:
        longer = next((t for t in models.tensors if name in t and t != name), None)
        if longer is not None:
            yield "outside", f"{name} is part of the name {longer}, so no filter tells them apart."


def _legal(param: Param) -> str:
    return f"{param.name} goes from {param.low:g} to {param.high:g}"
