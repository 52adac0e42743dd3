"""Which tensors each entry of a parameter governs: of the entries that match one, the first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from evomerge.config.layout import Layout, Role
from evomerge.config.params import Param
from evomerge.config.space import SpaceEntry

Fixed = float | bool | Mapping[str, float | bool]
"""Value of a parameter that is not searched: one for all parents, or one per parent."""


@dataclass(frozen=True)
class Models:
    """What a space has to fit.

    Attributes:
        parents: Names of the parents, in recipe order.
        layout: Their layers, and the tensors outside them.
        tensors: Names of all tensors.
    """

    parents: tuple[str, ...]
    layout: Layout
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Cover:
    """What one entry governs of one parent.

    Attributes:
        index: Position of the entry among its parameter's.
        parent: Name of the parent; None for a parameter shared by all.
        tensors: Names of the governed tensors.
        outside: Role and name of those outside the layers.
    """

    index: int
    parent: str | None
    tensors: tuple[str, ...]
    outside: tuple[tuple[Role, str], ...]


def covers(param: Param, entries: Sequence[SpaceEntry], models: Models) -> list[Cover]:
    """Return what each entry governs, for each of its parents, entry by entry."""
    parents = models.parents if param.per_model else (None,)
    found = [cover for parent in parents for cover in _covers_of(entries, parent, models)]
    return sorted(found, key=attrgetter("index"))


def _covers_of(entries: Sequence[SpaceEntry], parent: str | None, models: Models) -> list[Cover]:
    found, free = [], models.tensors
    for index, entry in enumerate(entries):
        if entry.models is not None and parent not in entry.models:
            continue
        governed = tuple(name for name in free if entry.filter is None or entry.filter in name)
        taken = frozenset(governed)
        free = tuple(name for name in free if name not in taken)
        outside = tuple(pair for pair in models.layout.outside if pair[1] in taken)
        found.append(Cover(index, parent, governed, outside))
    return found
