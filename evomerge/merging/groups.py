"""Groups: tensors of a merge that take the same values, whatever the numbers of its recipe are.

Which tensors are a group depends on their layers, and on which settings and rules are for them. So
a search, whose recipes differ in numbers alone, finds its groups once, and looks up each value once
per group and not once per tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evomerge.config.layout import Layout
from evomerge.config.params import Param
from evomerge.config.recipe import Recipe
from evomerge.config.resolve import Choice, Levels, Position, choose, chosen, chosen_value
from evomerge.errors import MergeError
from evomerge.merging.checks import stop_at, ties_problem
from evomerge.merging.parts import BoundPart, Part
from evomerge.methods.method import Method, Values

_ANYWHERE = Position(None, 1)
"""Stands for every position where there is no curve."""


class Cell(NamedTuple):
    """A place in a recipe that holds one number, or one of a curve's.

    Attributes:
        param: The parameter.
        part: Place of the part.
        parent: Place of the parent in the part; None for a value that all parents share.
        model: Name of the parent.
        choice: Which setting and rule; None for the parameter's default.
        position: Where on the curve.
    """

    param: Param
    part: int
    parent: int | None
    model: str | None
    choice: Choice | None
    position: Position


@dataclass(frozen=True)
class Group:
    """Tensors that take all their values from the same cells.

    Attributes:
        first: Name of the first of them, for messages.
        parents: Names of their parents.
        per_model: Parameter and the cells of the parents' values, by their numbers.
        shared: Parameter and the number of its cell.
    """

    first: str
    parents: tuple[str, ...]
    per_model: tuple[tuple[str, tuple[int, ...]], ...]
    shared: tuple[tuple[str, int], ...]

    @property
    def cells(self) -> tuple[int, ...]:
        """The cells, in the order in which a message names the first that is wrong."""
        own = (cell for _, cells in self.per_model for cell in cells)
        return (*own, *(cell for _, cell in self.shared))


@dataclass(frozen=True)
class Groups:
    """All groups of a merge.

    Attributes:
        method: The merge's method.
        parents: For each part and parent its place among the part's listed models; None for a base
            that is merged without being listed.
        cells: Every cell, once.
        groups: In the order of their first tensors.
    """

    method: Method
    parents: tuple[tuple[int | None, ...], ...]
    cells: tuple[Cell, ...]
    groups: tuple[Group, ...]

    def values(self, recipe: Recipe) -> tuple[Values, ...]:
        """Return the values of each group.

        Args:
            recipe: The one that the groups are of, or one that differs from it in numbers alone.

        Raises:
            MergeError: A value is missing or out of its legal range, or values are no merge
                together; one line for each of the first problems.
        """
        numbers, wrong = self._numbers(_levels(recipe, self.parents))
        found = tuple(_values(group, numbers) for group in self.groups)
        problems: dict[str, str] = {}
        for group, values in zip(self.groups, found, strict=True):
            problem = _missing(group, wrong) or self._refused(recipe, group, values)
            if problem:
                # what is wrong, and the first tensor where it is
                problems.setdefault(problem, group.first)
        stop_at(f"{name}: {problem}" for problem, name in problems.items())
        return found

    def _numbers(
        self, levels: Sequence[Mapping[int | None, Levels]]
    ) -> tuple[list[float | bool], dict[int, str]]:
        """Return the number in each cell, and what is wrong with those that have none."""
        numbers: list[float | bool] = []
        wrong: dict[int, str] = {}
        for param, part, parent, model, choice, position in self.cells:
            here = levels[part][parent]
            try:
                number = chosen_value(param, choice, position, here, self.method.name, model)
            except MergeError as error:
                wrong[len(numbers)], number = str(error), 0.0
            numbers.append(number)
        return numbers, wrong

    def _refused(self, recipe: Recipe, group: Group, values: Values) -> str | None:
        problem = self.method.refuse(values)
        if problem:
            return f"{', '.join(group.parents)}: {problem}"
        whole_model = bool(values.shared.get("trim_whole_model"))
        problem = ties_problem(recipe.threshold_ties, self.method, whole_model)
        return f"evomerge.threshold_ties: {problem}" if problem else None


def _values(group: Group, numbers: Sequence[float | bool]) -> Values:
    per_model = {
        name: tuple([float(numbers[cell]) for cell in cells]) for name, cells in group.per_model
    }
    return Values(per_model, {name: numbers[cell] for name, cell in group.shared})


def _missing(group: Group, wrong: Mapping[int, str]) -> str | None:
    return next((wrong[cell] for cell in group.cells if cell in wrong), None) if wrong else None


def _levels(
    recipe: Recipe, parents: Sequence[Sequence[int | None]]
) -> list[dict[int | None, Levels]]:
    """Return the levels of each parent of each part, and, for None, of what the parents share."""
    return [_levels_of(recipe, part, places) for part, places in enumerate(parents)]


def _levels_of(recipe: Recipe, part: int, places: Sequence[int | None]) -> dict[int | None, Levels]:
    listed = recipe.slices[part].sources if recipe.slices else recipe.models
    of_part = recipe.slices[part].parameters if recipe.slices else {}
    levels: dict[int | None, Levels] = {None: (of_part, recipe.parameters)}
    for parent, place in enumerate(places):
        own = {} if place is None else listed[place].parameters
        levels[parent] = own, of_part, recipe.parameters
    return levels


class GroupFinder:
    """Finds the groups of a merge, tensor by tensor.

    Args:
        recipe: The merge.
        method: Its method.
        bound: Its parts.
        layout: The layers of the recipe's donor.
    """

    def __init__(
        self, recipe: Recipe, method: Method, bound: Sequence[BoundPart], layout: Layout
    ) -> None:
        self._method, self._bound, self._layout = method, bound, layout
        self._parents = tuple(_places(each.part, method) for each in bound)
        self._levels = _levels(recipe, self._parents)
        self._cells: dict[Cell, int] = {}
        self._numbers: dict[tuple[int, ...], int] = {}
        self._groups: list[Group] = []

    def group_of(self, part: int, name: str) -> int:
        """Return the number of the group that a tensor of a part belongs to."""
        bound = self._bound[part]
        layer = self._layout.layer_of(name)
        first = bound.part.first_layer
        position = Position(None if layer is None else layer - first, bound.part.num_layers)
        per_model = tuple(
            (
                param.name,
                tuple(
                    self._cell(param, part, parent, member.given[name], position)
                    for parent, member in enumerate(bound.parents)
                ),
            )
            for param in self._method.params
            if param.per_model
        )
        shared = tuple(
            (param.name, self._cell(param, part, None, name, position))
            for param in self._method.params
            if not param.per_model
        )
        parents = tuple(member.name for member in bound.parents)
        group = Group(name, parents, per_model, shared)
        number = self._numbers.setdefault((part, *group.cells), len(self._groups))
        if number == len(self._groups):
            self._groups.append(group)
        return number

    def _cell(
        self, param: Param, part: int, parent: int | None, tensor: str, position: Position
    ) -> int:
        levels = self._levels[part][parent]
        choice = choose(param.name, tensor, levels)
        curved = choice is not None and isinstance(chosen(param.name, choice, levels), tuple)
        model = None if parent is None else self._bound[part].parents[parent].name
        cell = Cell(param, part, parent, model, choice, position if curved else _ANYWHERE)
        return self._cells.setdefault(cell, len(self._cells))

    def found(self) -> Groups:
        """Return the groups of the tensors asked for."""
        return Groups(self._method, self._parents, tuple(self._cells), tuple(self._groups))


def _places(part: Part, method: Method) -> tuple[int | None, ...]:
    """Return each parent's place among the part's sources; None for one that is not of them."""
    places = {id(source): place for place, source in enumerate(part.sources)}
    return tuple(places.get(id(source)) for source in part.parents_of(method))
