"""The resident model whose weights are overwritten for each candidate, and its tokenizer."""

from pathlib import Path
from typing import Any

import torch

from evomerge.errors import CheckpointError


def load_live_model(
    folder: Path, dtype: torch.dtype, attention: str | None, device: str
) -> torch.nn.Module:
    """Load a model as a user of its folder would: its config, its generation config.

    A candidate's live model starts from the base model, which also donates these files on export.

    Args:
        folder: The model's folder.
        dtype: Dtype of the parameters.
        attention: transformers' attention implementation; None is its default.
        device: `cpu` or `cuda`.

    Raises:
        CheckpointError: transformers cannot load it; its own words are kept.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    extra = {"attn_implementation": attention} if attention else {}
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, **extra
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise _unreadable(folder, "model", error) from None
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder.

    Raises:
        CheckpointError: There is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _unreadable(folder, "tokenizer", error) from None


def _unreadable(folder: Path, what: str, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:300]
    return CheckpointError(f"{folder}: transformers cannot load this {what} ({reason}).")
