"""The value a parameter takes for one tensor: rules by name, layer curves, the nearest level first.

Agrees with mergekit 0.1.5: a curve runs over the layers of one output slice, tensors outside the
layers take its first value, the first matching rule wins, and a level whose rules all miss is
skipped. Levels are, the nearest first: a model's own parameters, its slice's, the recipe's. Rules
for a model's own value look at the name of the tensor it gives, others at that of the merged one.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

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


class Choice(NamedTuple):
    """Which setting a tensor takes its value from; the same for whatever numbers it holds.

    Attributes:
        level: Place of the level.
        rule: Place of the rule; None for a setting without rules.
    """

    level: int
    rule: int | None


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
    choice = choose(param.name, tensor, levels)
    try:
        return chosen_value(param, choice, position, levels, method, model)
    except MergeError as error:
        raise MergeError(f"{tensor}: {error}") from None


def choose(name: str, tensor: str, levels: Levels) -> Choice | None:
    """Find the setting of a parameter that counts for a tensor; None where no level has one.

    Args:
        name: Of the parameter.
        tensor: Name that rules look at.
        levels: Parameters that may hold the value, the nearest first.
    """
    for place, level in enumerate(levels):
        if name in level:
            rules = rules_of(level[name])
            if rules is None:
                return Choice(place, None)
            for number, rule in enumerate(rules):
                if rule.matches(tensor):
                    return Choice(place, number)
    return None


def chosen_value(
    param: Param,
    choice: Choice | None,
    position: Position,
    levels: Levels,
    method: str,
    model: str | None = None,
) -> float | bool:
    """Return the value that a choice of `choose` stands for; as `parameter_at` otherwise.

    Raises:
        MergeError: As `parameter_at`, without the name of a tensor.
    """
    if choice is None:
        if param.default is None:
            raise MergeError(
                f"{method} needs {param.name}{_for(model)}, and the recipe gives none. "
                "Add it to parameters."
            )
        return param.default
    said = chosen(param.name, choice, levels)
    value = curve_at(said, *position) if isinstance(said, tuple) else said
    problem = _wrong_with(param, value)
    if problem:
        came = f"{param.name} is {value!r}{_for(model)}"
        raise MergeError(f"{came}, {problem}. Change the recipe.")
    return _of_kind(param, value)


def rules_of(setting: Setting) -> tuple[Rule, ...] | None:
    """Return a setting's rules; None where it is a value for every tensor."""
    has_rules = isinstance(setting, tuple) and bool(setting) and isinstance(setting[0], Rule)
    return cast("tuple[Rule, ...]", setting) if has_rules else None


def chosen(name: str, choice: Choice, levels: Levels) -> float | bool | Curve:
    """Return what a choice of `choose` stands for: a number or switch, or a layer curve."""
    setting = levels[choice.level][name]
    said = setting if choice.rule is None else cast("tuple[Rule, ...]", setting)[choice.rule].value
    return cast("float | bool | Curve", said)


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
