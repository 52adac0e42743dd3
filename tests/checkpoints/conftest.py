"""Seeded tensors and a tiny Llama on disk."""

import json

import pytest
import torch
from safetensors.torch import save_file

CONFIG = '{"model_type": "llama", "tie_word_embeddings": false, "num_hidden_layers": 2}'


def random_bits(shape, dtype, seed):
    """Return a tensor of any bit patterns: NaNs with payloads, infinities, subnormals, -0."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        return (bits % 2).view(torch.bool).reshape(shape)
    return bits.view(dtype).reshape(shape)


def save(folder, shards, config=CONFIG):
    """Save shards with safetensors' own writer; several get an index. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config)
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    listed = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        listed |= dict.fromkeys(shard, file)
    write_index(folder, listed)
    return folder


def write_index(folder, listed):
    text = json.dumps({"metadata": {}, "weight_map": listed})
    (folder / "model.safetensors.index.json").write_text(text)


def same_bits(one, other):
    def raw(tensor):
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return (
        one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))
    )


def llama_config(**settings):
    from transformers import LlamaConfig

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**sizes, **settings})


def llama(**settings):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**settings)).to(torch.bfloat16)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture
def tensors():
    """Two layers of mixed dtypes, with shapes that leave odd sizes and an empty tensor."""
    return {
        "model.embed_tokens.weight": random_bits((7, 5), torch.bfloat16, 0),
        "model.layers.0.up.weight": random_bits((3, 5), torch.float32, 1),
        "model.layers.0.mask": random_bits((3,), torch.bool, 2),
        "model.layers.1.up.weight": random_bits((3, 5), torch.float16, 3),
        "model.layers.1.ids": random_bits((2, 1, 2), torch.int64, 4),
        "model.layers.10.empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "model.norm.weight": random_bits((), torch.float32, 5),
        "lm_head.weight": random_bits((7, 5), torch.bfloat16, 6),
    }
