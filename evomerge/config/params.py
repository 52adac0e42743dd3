"""Param: one number or switch of a merge method, declared once with its legal and search range."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Param:
    """One parameter of a merge method.

    Attributes:
        name: As written in recipes and configs (mergekit's name, e.g. `lambda`).
        meaning: One phrase for the documentation and for `evomerge check`.
        default: Value where a recipe gives none; None means the recipe must give it.
        per_model: Whether each parent has its own value.
        kind: `float`, `int` or `bool`.
        low, high: Legal range, both ends allowed; ignored for `bool`.
        search: Range searched when the config names none; None means that the config must name it.
    """

    name: str
    meaning: str
    default: float | bool | None
    per_model: bool
    kind: Literal["float", "int", "bool"] = "float"
    low: float = float("-inf")
    high: float = float("inf")
    search: tuple[float, float] | None = None
