"""Which layers share a knob, and what those knobs are called."""

from evomerge.config.space import LayerScope, Scope

Groups = tuple[tuple[int, int], ...]
"""First and last layer of each group, both included."""


def layer_groups(scope: Scope, num_layers: int) -> Groups:
    """Return the layer groups of a scope; `global` and curves have none."""
    if scope == "per_layer":
        return tuple((layer, layer) for layer in range(num_layers))
    if isinstance(scope, LayerScope) and scope.every is not None:
        starts = range(0, num_layers, scope.every)
        return tuple((first, min(first + scope.every, num_layers) - 1) for first in starts)
    return (scope.groups or ()) if isinstance(scope, LayerScope) else ()


def group_names(groups: Groups, num_layers: int) -> tuple[str, ...]:
    """Return a name for each group, `layer_05` or `layers_00_07`; the names sort."""
    digits = len(str(num_layers - 1))
    return tuple(
        f"layer_{first:0{digits}}"
        if first == last
        else f"layers_{first:0{digits}}_{last:0{digits}}"
        for first, last in groups
    )


def scope_problem(scope: Scope, num_layers: int) -> str | None:
    """Return what is wrong with a scope for models of this many layers; None when it fits."""
    if not isinstance(scope, LayerScope):
        return None
    if scope.curve is not None and scope.curve > num_layers:
        return (
            f"a curve of {scope.curve} knots has more knobs than the models have layers "
            f"({num_layers}). Write fewer."
        )
    if scope.every is not None and scope.every >= num_layers > 1:
        return (
            f"groups of {scope.every} layers leave one group, the models have {num_layers} layers. "
            "Write fewer, or scope: global."
        )
    return _groups_problem(scope.groups, num_layers) if scope.groups is not None else None


def _groups_problem(groups: Groups, num_layers: int) -> str | None:
    expected = 0
    for first, last in groups:
        if first != expected or last < first:
            return (
                f"[{first}, {last}] came where a group that begins with layer {expected} is "
                f"needed. Cover the layers 0 to {num_layers - 1} once, in order."
            )
        expected = last + 1
    if expected != num_layers:
        return (
            f"the groups end with layer {expected - 1}, the models with layer {num_layers - 1}. "
            "Cover every layer once."
        )
    return None
