"""Knob: one searchable number, and its map between the unit interval and the values a recipe holds.

Values lie on a grid, so that the recipe, its YAML and the trial's parameters are the same numbers:
1e-6 on a linear scale, six significant digits on a logarithmic one. Whole numbers and choices get
equal shares of the interval (on a logarithmic scale, shares of its length there).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

KnobValue = float | int | bool
"""What a knob is set to."""

DECIMALS = 6
"""Decimals of a value on a linear scale, significant digits on a logarithmic one."""


@dataclass(frozen=True)
class Knob:
    """One searchable number.

    Attributes:
        name: Unique within its space; the parameter, then the parent, filter and layers it is for.
        kind: `float`, `int`, or `choice` between listed values.
        low, high: Range, both ends included and on the grid; of a `choice`, its positions.
        scale: `linear` or `log`; `log` has low > 0 and is not for `choice`.
        choices: The values of a `choice`; empty for other kinds.
        initial: Value to start from.
        sigma: First step as a share of the range; None leaves it to the proposer.
    """

    name: str
    kind: Literal["float", "int", "choice"]
    low: float
    high: float
    initial: KnobValue
    scale: Literal["linear", "log"] = "linear"
    choices: tuple[KnobValue, ...] = ()
    sigma: float | None = None

    def value(self, unit: float) -> KnobValue:
        """Return the value at a position in [0, 1]; `value(unit(v)) == v` for what this returns."""
        ends = self._ends()
        position = ends[0] + unit * (ends[1] - ends[0])
        if self.kind == "float":
            return self.on_grid(self._unscale(position))
        number = int(min(max(math.floor(self._unscale(position)), self.low), self.high))
        return self.choices[number] if self.kind == "choice" else number

    def unit(self, value: KnobValue) -> float:
        """Return the position in [0, 1] of a value: the middle of its share, where it has one."""
        ends = self._ends()
        if self.kind == "float":
            position = self._scale(float(value))
        else:
            number = self.choices.index(value) if self.kind == "choice" else int(value)
            position = (self._scale(number) + self._scale(number + 1)) / 2
        return min(max((position - ends[0]) / (ends[1] - ends[0]), 0.0), 1.0)

    def step(self, default: float) -> float:
        """Return the first step as a share of the range: the knob's own, else the default.

        Whole numbers and choices step by half a value's share or more, so that others are tried.
        """
        if self.sigma is not None:
            return self.sigma
        return default if self.kind == "float" else max(default, 0.5 / (self.high - self.low + 1))

    def on_grid(self, number: float) -> float:
        """Return the nearest grid value within the range, for a `float` knob."""
        return min(max(round_to_grid(number, self.scale), float(self.low)), float(self.high))

    def describe(self) -> dict[str, Any]:
        """Return the knob as plain data, part of a study's identity."""
        return {
            "name": self.name,
            "kind": self.kind,
            "scale": self.scale,
            "low": self.low,
            "high": self.high,
            "choices": list(self.choices),
            "initial": self.initial,
            "sigma": self.sigma,
        }

    def _ends(self) -> tuple[float, float]:
        # a whole number's share reaches up to the next one
        last = self.high if self.kind == "float" else self.high + 1
        return self._scale(self.low), self._scale(last)

    def _scale(self, number: float) -> float:
        return math.log(number) if self.scale == "log" else number

    def _unscale(self, position: float) -> float:
        return math.exp(position) if self.scale == "log" else position


def round_to_grid(number: float, scale: Literal["linear", "log"]) -> float:
    """Return the nearest number that a recipe can hold on this scale."""
    if scale == "log":
        return float(f"{number:.{DECIMALS}g}")
    # + 0.0 turns -0.0 into 0.0: equal merges must have equal hashes
    return round(number, DECIMALS) + 0.0
