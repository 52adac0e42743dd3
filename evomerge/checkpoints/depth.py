"""config.json of a model whose layers were restacked: its depth, and what it says per layer."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from evomerge.errors import MergeError

Config = dict[str, Any]

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
# lists of layer numbers; any other list as long as the model is deep has an entry per layer
_NUMBERS = (
    "moe_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "cross_attention_layers",
)
# how many layers from the first on are of a kind
_LEADING = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
_NOT_PER_LAYER = ("architectures", "keys_to_ignore_at_inference")
_NOT_PER_LAYER_ENDS = ("_id", "_ids", "_limit", "_multipliers")


def with_depth(config: Mapping[str, Any], layers: Sequence[int]) -> Config:
    """Return the config of a model that is a stack of this model's layers.

    What transformers would derive from a layer's position (which layers use a sliding window, say)
    is written out from the position the layer had, so that a layer stays what it was.

    Args:
        config: A config.json; not written to. The language model's part may be its `text_config`.
        layers: For each layer of the result, the number of the layer it comes from.

    Returns:
        A new config.json with the number of layers, lists with an entry per layer, lists of layer
        numbers and counts of leading layers adapted.

    Raises:
        MergeError: There are no layers, or one the model does not have; or the config can say only
            by position what the layers are, and the new positions say something else.
    """
    new = deepcopy(dict(config))
    part = _layered(new)
    key = next((key for key in _DEPTHS if key in part), None)
    if key is None:
        raise MergeError(
            f"config.json: has none of {', '.join(_DEPTHS)}, so its depth cannot be changed."
        )
    depth = part[key]
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise MergeError(
            f"config.json: layers {list(layers)} were asked for, and the model has layers 0 to "
            f"{depth - 1}. Name at least one, and only those."
        )
    stored = {**part, **_derived_lists(part, depth)}
    part |= {name: _restacked(name, value, layers, depth) for name, value in stored.items()}
    part |= _experts(part, stored, layers, depth)
    part[key] = len(layers)
    _check(new, part, key)
    return new


def _layered(config: Config) -> Config:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and any(key in nested for key in _DEPTHS) else config


def _known(config: Mapping[str, Any]) -> Callable[..., Any] | None:
    """Return the config class of a model type that transformers has itself, else None."""
    from transformers import CONFIG_MAPPING

    try:  # this mapping's `get` sees only what was asked for before
        return CONFIG_MAPPING[config["model_type"]]
    except KeyError:
        return None


def _derived_lists(part: Config, depth: int) -> Config:
    """Return the lists with an entry per layer that transformers derives and the file lacks."""
    known = _known(part)
    if known is None:
        return {}
    whole = known(**part).to_dict()
    return {
        name: value
        for name, value in whole.items()
        if part.get(name) is None and "layer" in name and _is_per_layer(name, value, depth)
    }


def _is_per_layer(name: str, value: object, depth: int) -> bool:
    named = name not in _NOT_PER_LAYER and not name.endswith(_NOT_PER_LAYER_ENDS)
    return isinstance(value, list) and len(value) == depth and named


def _restacked(name: str, value: Any, layers: Sequence[int], depth: int) -> Any:
    if name in _NUMBERS and isinstance(value, list):
        return [place for place, layer in enumerate(layers) if layer in value]
    if name in _LEADING and isinstance(value, int):
        return _leading(name, value, layers)
    if name.endswith("_period") and isinstance(value, int):
        moved = [place for place, layer in enumerate(layers) if (layer - place) % value]
        if moved:
            raise _by_position(name, value, layers[moved[0]], moved[0])
    return [value[layer] for layer in layers] if _is_per_layer(name, value, depth) else value


def _leading(name: str, count: int, layers: Sequence[int]) -> int:
    of_kind = [layer < count for layer in layers]
    leading = [*of_kind, False].index(False)
    # a window is said by layer_types too; whether a layer has experts is said here alone
    if name != "max_window_layers" and any(of_kind[leading:]):
        place = of_kind.index(True, leading)
        raise _by_position(name, count, layers[place], place)
    return leading


def _by_position(name: str, value: int, layer: int, place: int) -> MergeError:
    return MergeError(
        f"config.json: {name}: {value} says by position what a layer is, and layer {layer} would "
        f"be another kind at position {place}. Stack the layers so that they keep their kinds."
    )


def _experts(part: Config, stored: Config, layers: Sequence[int], depth: int) -> Config:
    """Say which layers lack experts by number, where the file says it by number or by step."""
    if "decoder_sparse_step" not in part and "mlp_only_layers" not in part:
        return {}
    only, step = stored.get("mlp_only_layers") or [], stored.get("decoder_sparse_step", 1)
    dense = {layer for layer in range(depth) if layer in only or (layer + 1) % step}
    places = [place for place, layer in enumerate(layers) if layer in dense]
    return {"mlp_only_layers": places, "decoder_sparse_step": 1}


def _check(new: Config, part: Config, key: str) -> None:
    from huggingface_hub.errors import StrictDataclassError

    known = _known(part)
    if known is None:
        return
    try:
        known(**part)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MergeError(
            f"config.json: transformers does not take this model with {key} {part[key]} ({reason})."
        ) from None
