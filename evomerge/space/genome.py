"""Genome: one point of a space, a number in [0, 1] for each knob."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Genome:
    """A candidate as the proposer sees it. Genomes are equal when their numbers are.

    Attributes:
        units: float64 numbers in [0, 1], one for each knob of the space, in order. JSON keeps
            them exactly, as a list.
    """

    units: tuple[float, ...]

    def __post_init__(self) -> None:
        assert all(0.0 <= unit <= 1.0 for unit in self.units), f"{self.units} leaves [0, 1]"

    def distance(self, other: "Genome") -> float:
        """Return the Euclidean distance to another genome of the same space."""
        return math.dist(self.units, other.units)
