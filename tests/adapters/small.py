"""Adapters written by hand in PEFT's format, so that what reads them is not what wrote them."""

import json

import torch
from safetensors.torch import load_file, save_file

from evomerge.config.models import FolderRef, ModelRef


def make_adapter(folder, base, seed, ranks, *, file="safetensors", saved=(), **fields):
    """Write a random adapter; returns nothing but files.

    Args:
        folder: Where to write.
        base: Folder of the model.
        seed: Decides every number.
        ranks: Module to rank.
        file: `safetensors` or `bin`.
        saved: Names of tensors that are replaced.
        fields: Of adapter_config.json.
    """
    shapes = {name: tensor.shape for name, tensor in load_file(base / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, rank in ranks.items():
        outputs, inputs = shapes[f"{module}.weight"]
        a = torch.randn(rank, inputs, generator=generator)
        b = torch.randn(outputs, rank, generator=generator)
        tensors[f"base_model.model.{module}.lora_A.weight"] = 0.1 * a
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * b
    for name in saved:
        tensors[f"base_model.model.{name}"] = torch.randn(shapes[name], generator=generator)
    usual = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    write_adapter_files(folder, tensors, {**usual, **fields}, file)


def write_adapter_files(folder, tensors, config, file="safetensors"):
    """Write the two files of an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if file == "bin":
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")


def layer(number, module="self_attn.q_proj"):
    """Name of a module of a layer."""
    return f"model.layers.{number}.{module}"


def reference(base, adapter=None):
    """A reference to local folders, as `relative_to` leaves it."""
    return ModelRef(path=str(base), adapter=FolderRef(path=str(adapter)) if adapter else None)
