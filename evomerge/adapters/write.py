"""Write an adapter in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from evomerge.adapters.adapter import LowRank
from evomerge.adapters.bind import PREFIX
from evomerge.config.models import ModelRef


def write_peft(
    folder: Path,
    base: ModelRef,
    low_rank: Mapping[str, LowRank],
    saved: Mapping[str, torch.Tensor],
    *,
    ties_head: bool,
) -> None:
    """Write an adapter into an existing folder; PEFT's `from_pretrained` loads it on `base`.

    Every module's alpha is its rank, so that PEFT scales by 1.

    Args:
        folder: Where to write; existing files of these names are overwritten.
        base: The model it is for.
        low_rank: What is added, each with scale 1, by any name; they know their module.
        saved: Tensors that replace the model's, by their name in the module tree.
        ties_head: Whether the head of a tied model is to follow the adapted embedding.
    """
    ranks = {part.module: part.rank for part in low_rank.values()}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.path,
        "revision": base.revision,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved}) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(p.transposed and not p.embedding for p in low_rank.values()),
        "use_rslora": False,
        "ensure_weight_tying": ties_head,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in saved.items()}
    for part in low_rank.values():
        kind = "lora_embedding_{}" if part.embedding else "lora_{}.weight"
        tensors[f"{PREFIX}{part.module}.{kind.format('A')}"] = part.a_RI
        tensors[f"{PREFIX}{part.module}.{kind.format('B')}"] = part.b_OR
    tensors = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
