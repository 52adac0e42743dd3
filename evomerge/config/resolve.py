"""The value a parameter takes for one tensor: rules by name, layer curves, a model's own first.

Agrees with mergekit 0.1.5: tensors outside the layers take the first value of a curve, the first
matching rule wins, and a level whose rules all miss is skipped. A model's own parameters come
before the shared ones.
"""

from evomerge.config.layout import Layout
from evomerge.config.params import Param
from evomerge.config.recipe import Curve, Recipe, Rule, Setting, Source
from evomerge.errors import MergeError


def parameter_at(
    param: Param, tensor: str, layout: Layout, recipe: Recipe, source: Source | None
) -> float | bool:
    """Return the value of a method's parameter for one tensor.

    Args:
        param: The method's declaration.
        tensor: Name of the tensor.
        layout: Layers of the models.
        recipe: The merge.
        source: The model in question; None for a parameter shared by all models.

    Raises:
        MergeError: No level gives a value and the parameter has no default, or the value is out of
            its legal range.
    """
    levels = [recipe.parameters] if source is None else [source.parameters, recipe.parameters]
    for level in levels:
        if param.name in level:
            value = setting_at(level[param.name], tensor, layout)
            if value is not None:
                return _checked(param, value, tensor)
    if param.default is None:
        who = f" for {source.model}" if source else ""
        raise MergeError(
            f"{tensor}: {recipe.merge_method} needs {param.name}{who}, and the recipe gives none. "
            "Add it to parameters."
        )
    return param.default


def setting_at(setting: Setting, tensor: str, layout: Layout) -> float | bool | None:
    """Return what a setting says about one tensor; None when none of its rules matches."""
    if not isinstance(setting, tuple):
        return setting
    rules = [part for part in setting if isinstance(part, Rule)]
    if rules:
        rule = next((rule for rule in rules if rule.matches(tensor)), None)
        return None if rule is None else setting_at(rule.value, tensor, layout)
    points = [part for part in setting if not isinstance(part, Rule)]
    return curve_at(points, layout.layer_of(tensor), layout)


def curve_at(curve: Curve | list[float], layer: int | None, layout: Layout) -> float:
    """Return a layer curve's value, linear between its points.

    The points lie evenly from the first layer to the last. A curve with one value per layer gives
    exactly those values. Outside the layers (`layer` None) it gives its first value.
    """
    if layer is None or len(curve) == 1:
        return curve[0]
    if len(curve) == layout.num_layers:
        return curve[layer]
    if layout.num_layers == 1:
        return curve[-1]
    position = layer / (layout.num_layers - 1) * (len(curve) - 1)
    left = min(int(position), len(curve) - 2)
    share = position - left
    return curve[left] * (1.0 - share) + curve[left + 1] * share


def _checked(param: Param, value: float | bool, tensor: str) -> float | bool:
    if param.kind == "bool":
        return bool(value)
    if not param.low <= value <= param.high:
        raise MergeError(
            f"{tensor}: {param.name} is {value!r}, allowed are values from {param.low:g} to "
            f"{param.high:g}. Change the recipe."
        )
    return value
