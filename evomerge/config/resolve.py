"""The value a parameter takes for one tensor: rules by name, layer curves, the nearest level first.

Agrees with mergekit 0.1.5: a curve runs over the layers of one output slice, tensors outside the
layers take its first value, the first matching rule wins, and a level whose rules all miss is
skipped. Levels are, the nearest first: a model's own parameters, its slice's, the recipe's. Rules
for a model's own value look at the name of the tensor it gives, others at that of the merged one.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from evomerge.config.params import Param
from evomerge.config.recipe import Curve, Rule, Setting
from evomerge.errors import MergeError

Levels = Sequence[Mapping[str, Setting]]
"""Parameters that may hold a value, the nearest first."""


class Position(NamedTuple):
    """Where a tensor stands in its output slice.

    Attributes:
        layer: Its layer, from 0; None outside the layers.
        num_layers: Number of layers of the slice, at least 1.
    """

    layer: int | None
    num_layers: int


def parameter_at(
    param: Param,
    tensor: str,
    position: Position,
    levels: Levels,
    method: str,
    model: str | None = None,
) -> float | bool:
    """Return the value of a method's parameter for one tensor.

    Args:
        param: The method's declaration.
        tensor: Name that rules look at.
        position: Where the tensor stands.
        levels: Parameters that may hold the value, the nearest first.
        method: Name of the method.
        model: The model in question; None for a parameter shared by all models.

    Raises:
        MergeError: No level gives a value and the parameter has no default, or the value is out of
            its legal range.
    """
    for level in levels:
        if param.name in level:
            value = setting_at(level[param.name], tensor, position)
            if value is not None:
                problem = _wrong_with(param, value)
                if problem:
                    came = f"{param.name} is {value!r}{_for(model)}"
                    raise MergeError(f"{tensor}: {came}, {problem}. Change the recipe.")
                return _of_kind(param, value)
    if param.default is None:
        raise MergeError(
            f"{tensor}: {method} needs {param.name}{_for(model)}, and the recipe gives none. "
            "Add it to parameters."
        )
    return param.default


def setting_at(setting: Setting, tensor: str, position: Position) -> float | bool | None:
    """Return what a setting says about one tensor; None when none of its rules matches."""
    if not isinstance(setting, tuple):
        return setting
    rules = [part for part in setting if isinstance(part, Rule)]
    if rules:
        rule = next((rule for rule in rules if rule.matches(tensor)), None)
        return None if rule is None else setting_at(rule.value, tensor, position)
    return curve_at([part for part in setting if not isinstance(part, Rule)], *position)


def curve_at(curve: Curve | list[float], layer: int | None, num_layers: int) -> float:
    """Return a layer curve's value, linear between its points.

    The points lie evenly from the first layer to the last. A curve with one value per layer gives
    exactly those values. Outside the layers (`layer` None) it gives its first value.
    """
    if layer is None or len(curve) == 1:
        return curve[0]
    if len(curve) == num_layers:
        return curve[layer]
    if num_layers == 1:
        return curve[-1]
    position = layer / (num_layers - 1) * (len(curve) - 1)
    left = min(int(position), len(curve) - 2)
    share = position - left
    return curve[left] * (1.0 - share) + curve[left + 1] * share


def _for(model: str | None) -> str:
    return f" for {model}" if model else ""


def _wrong_with(param: Param, value: float | bool) -> str | None:
    if param.kind == "bool":
        return None if value in (0, 1) else "true or false is needed"
    if not param.low <= value <= param.high:
        return f"allowed are values from {param.low:g} to {param.high:g}"
    if param.kind == "int" and value != int(value):
        return "a whole number is needed"
    return None


def _of_kind(param: Param, value: float | bool) -> float | bool:
    if param.kind == "float":
        return float(value)
    return bool(value) if param.kind == "bool" else int(value)
