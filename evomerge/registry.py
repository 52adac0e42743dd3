"""Table: name -> object, and the nearest names when a name is missed."""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Generic, TypeVar

from evomerge.errors import ConfigError

Row = TypeVar("Row")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean x?"` for the nearest known name, or all names when none is near."""
    names = list(known)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]}?"
    return f" Known: {', '.join(sorted(names))}." if names else ""


class Table(Mapping[str, Row], Generic[Row]):
    """A read-only table of named rows, e.g. the merge methods.

    Args:
        kind: What a row is, in the user's words; opens the message of a miss.
        rows: Name and object of each row; a name that comes twice is refused.
    """

    def __init__(self, kind: str, rows: Iterable[tuple[str, Row]]) -> None:
        self.kind = kind
        self._rows: dict[str, Row] = {}
        for name, row in rows:
            assert name not in self._rows, f"{kind} {name!r} stands twice in its table"
            self._rows[name] = row

    def __getitem__(self, name: str) -> Row:
        """Return the row.

        Raises:
            ConfigError: No such row; the message names the nearest.
        """
        if name not in self._rows:
            raise ConfigError(f"{self.kind} {name!r} is not known.{did_you_mean(name, self._rows)}")
        return self._rows[name]

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
