"""adapter_config.json: rank and scale of every module, and what is refused by name.

PEFT's format, https://huggingface.co/docs/peft/package_reference/lora; its rules for patterns are
those of version 0.21.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.checkpoints.index import read_json
from evomerge.errors import CheckpointError

_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""Named initialisations that leave the model's own weights alone."""

_UNSUPPORTED = {
    "use_dora": "DoRA, which scales the model's own columns too",
    "lora_bias": "biases inside LoRA",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron's parallel layers",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "single trained token rows",
    "alora_invocation_tokens": "activated LoRA, which acts on some tokens only",
    "use_qalora": "QALoRA, which pools its inputs",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing between adapters",
    "monteclora_config": "MonteCLoRA, which draws its weights",
    "kasa_config": "KaSA, which changes the model's own weights",
}


@dataclass(frozen=True)
class AdapterConfig:
    """What the numbers of an adapter depend on besides its tensors.

    Attributes:
        rank: Rank of the modules that no pattern names.
        alpha: Numerator of their scale.
        rank_pattern: Regular expression to rank; the first that matches the end of a module's name,
            from its beginning or from a dot, counts.
        alpha_pattern: As `rank_pattern`, for alpha.
        stabilized: Whether the scale is alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023,
            https://arxiv.org/abs/2312.03732) rather than alpha / rank.
        ties_head: Whether the head of a model with tied embeddings follows the adapted embedding.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    stabilized: bool
    ties_head: bool

    def rank_of(self, module: str) -> int:
        """Return a module's rank."""
        return next(_matching(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """Return what B @ A is multiplied by in a module."""
        alpha = next(_matching(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.stabilized else alpha / rank


def _matching(pattern: Mapping[str, Any], module: str) -> Any:
    return (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module))


def read_config(folder: Path, label: str) -> AdapterConfig:
    """Read an adapter's config.

    Args:
        folder: The adapter's folder.
        label: How messages name the adapter.

    Raises:
        CheckpointError: The file cannot be read, a value is none that PEFT writes, or the adapter
            is of a kind that is not supported.
    """
    fields = read_json(folder / "adapter_config.json", label)
    _refuse_kinds(fields, label)
    try:
        config = AdapterConfig(
            rank=_positive(fields.get("r", 8)),
            alpha=float(fields.get("lora_alpha", 8)),
            rank_pattern={_regex(k): _positive(v) for k, v in _pattern(fields, "rank_pattern")},
            alpha_pattern={_regex(k): float(v) for k, v in _pattern(fields, "alpha_pattern")},
            stabilized=bool(fields.get("use_rslora")),
            ties_head=bool(fields.get("ensure_weight_tying")),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{label}: adapter_config.json has a rank, an alpha or a pattern of them that PEFT "
            f"would not write ({error}). Save the adapter again."
        ) from error
    return config


def _refuse_kinds(fields: Mapping[str, Any], label: str) -> None:
    start = str(fields.get("init_lora_weights", True)).lower()
    found = [
        f"{key}: {fields[key]!r} ({what})" for key, what in _UNSUPPORTED.items() if fields.get(key)
    ]
    if fields.get("peft_type") != "LORA":
        found = [f"peft_type: {fields.get('peft_type')!r} (another kind of adapter)"]
    elif fields.get("bias", "none") != "none":
        found.append(f"bias: {fields['bias']!r} (trained biases of the model)")
    elif start not in ("true", "false", *_PLAIN_STARTS):
        found.append(
            f"init_lora_weights: {start!r} (a start that changes the model's own weights; PEFT "
            "converts it with path_initial_model_for_weight_conversion)"
        )
    if found:
        raise CheckpointError(
            f"{label}: adapter_config.json has {found[0]}, which is not supported. Supported is "
            "plain LoRA; merge the adapter into its model with PEFT and name the merged model."
        )


def _pattern(fields: Mapping[str, Any], key: str) -> Any:
    return (fields.get(key) or {}).items()


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from error
    return text


def _positive(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"a rank of {value!r}")
    return value
