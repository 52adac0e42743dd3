"""Where each stored tensor lies in a live model: views of its memory, by the names on disk.

transformers renames tensors when it loads them, and holds the experts of most mixture-of-experts
models in one tensor where files hold them apart. Which one lies where is read from its own
conversion table, so no family is named here.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from evomerge.errors import MergeError


def live_views(model: torch.nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Find stored tensors in a model's memory.

    Args:
        model: Any module, on any device; of a transformers model, names and layout are those of its
            files, present and past; of another module, those of its `state_dict`.
        names: Names of stored tensors.

    Returns:
        Name and view of a parameter or persistent buffer, of the shape it is stored in and maybe
        not contiguous. A name that has no place in the model is left out.

    Raises:
        MergeError: transformers computes what it holds from a stored tensor, instead of placing it.
    """
    from transformers import PreTrainedModel

    state = model.state_dict()
    if not isinstance(model, PreTrainedModel):
        return {name: state[name] for name in names if name in state}
    return _views_of(model, state, names)


def _views_of(
    model: Any, state: dict[str, torch.Tensor], names: Iterable[str]
) -> dict[str, torch.Tensor]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix = model.base_model_prefix
    views: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    # some renamings depend on what was seen before, and transformers goes in this order
    for name in sorted(names, key=dot_natural_key):
        live, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if live not in state and name in state:
            live, pattern = name, None
        if live in state and pattern is None:
            views[name] = state[live]
        elif live in state and pattern is not None:
            if live not in parts:
                parts[live] = _parts(model, live, state[live], by_pattern[pattern])
            part, _ = rename_source_key(name, renamings, [], prefix, parts[live])
            if part not in parts[live]:
                raise _not_placed(name, live)
            views[name] = parts[live][part]
    return views


def _parts(model: Any, live: str, tensor: torch.Tensor, converter: Any) -> dict[str, torch.Tensor]:
    """Take a live tensor apart as transformers does on saving, into views of it.

    Returns:
        Name in transformers' terms -> view. Empty where what would be saved is no view of this
        tensor.
    """
    if len(converter.target_patterns) > 1:  # one stored tensor lies in several live ones
        return {}
    try:
        reverse = converter.reverse_transform()
        stored, pattern = reverse.rename_source_key(live)
        reverse.add_tensor(stored, live, pattern, tensor)
        with _WithoutCopies():
            parts = reverse.convert(stored, model=model, config=model.config)
    except (NotImplementedError, ValueError):  # an operation that has no reverse
        return {}
    memory = tensor.untyped_storage().data_ptr()
    return {
        name: part
        for name, part in parts.items()
        if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() == memory
    }


def _not_placed(name: str, live: str) -> MergeError:
    return MergeError(
        f"{name}: transformers makes {live} of it by more than placing it, so it cannot be "
        "written into a live model. Merge to a folder, and score that."
    )


class _WithoutCopies(TorchFunctionMode):
    """Here, what is cut out of a tensor stays a view of it, contiguous or not."""

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def left_out(model: torch.nn.Module, name: str) -> bool:
    """Tell whether transformers leaves a stored tensor out on purpose when it loads this model.

    So it is with layers for predicting several tokens, and with what older versions stored.
    """
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)
