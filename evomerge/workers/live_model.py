"""The resident model whose weights are overwritten for each candidate."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evomerge.checkpoints.index import read_json
from evomerge.checkpoints.sidecars import CONFIG_FILES, configs_of, token_ids
from evomerge.errors import CheckpointError


def load_live_model(
    folder: Path,
    dtype: torch.dtype,
    attention: str | None,
    device: str,
    config_changes: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """Load a model as a user of its folder would: its config, its generation config.

    A candidate's live model starts from the base model, which also donates these files on export.

    Args:
        folder: The model's folder.
        dtype: Dtype of the parameters.
        attention: transformers' attention implementation; None is its default.
        device: `cpu` or `cuda`.
        config_changes: Fields put over those of config.json, for a merge of another depth
            (`depth.with_depth`) or vocabulary. No weight is read then: what the parameters hold is
            undefined until a merge has overwritten all of them. None loads the weights.

    Raises:
        CheckpointError: transformers cannot load it; its own words are kept.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    extra = {"attn_implementation": attention} if attention else {}
    try:
        if config_changes is None:
            model = _with_weights(folder, dtype, extra)
        else:
            model = _without_weights(folder, dtype, extra, config_changes, device)
    except (
        OSError,
        ValueError,
        RuntimeError,
        ImportError,
        KeyError,
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder}: transformers cannot load this model ({reason})."
        ) from None
    return model.to(device).eval().requires_grad_(False)


def _with_weights(folder: Path, dtype: torch.dtype, extra: Mapping[str, str]) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, **extra
    )
    return model


def _without_weights(
    folder: Path,
    dtype: torch.dtype,
    extra: Mapping[str, str],
    changes: Mapping[str, Any],
    device: str,
) -> torch.nn.Module:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    fields = {**read_json(folder / "config.json", str(folder)), **changes}
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    # buffers such as rotary frequencies are computed on the CPU, as `from_pretrained` does
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **extra)
    _keep_wide(model, dtype)
    for parameter in model.parameters():
        parameter.data = torch.empty_like(parameter, device=device)
    model.tie_weights()
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    resident: torch.nn.Module = model
    return resident


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Put into float32 what transformers keeps in float32 when it loads a 16-bit model."""
    kept = model._get_dtype_plan(dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if any(re.search(part, name) for part in kept):
            tensor.data = tensor.data.float()


def take_token_ids(model: Any, donor: Path, numbered_by: Path) -> None:
    """Give a live model the special-token ids of the model whose token numbers a merge has.

    The same that the merge's files get (`checkpoints/sidecars.py`).

    Args:
        model: A transformers model with the donor's configs.
        donor: Folder that it was loaded from.
        numbered_by: Folder of the model with these token numbers.
    """
    configs, others = configs_of(donor), configs_of(numbered_by)
    for name, own in zip(CONFIG_FILES, (model.config, model.generation_config), strict=True):
        for key, value in token_ids(configs.get(name, {}), others.get(name, {})).items():
            setattr(own, key, value)
