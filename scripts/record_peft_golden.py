"""Record what PEFT makes of tiny models with adapters: tests/golden/peft.

Run in an environment with peft 0.21.2 and transformers, from the root of the repository:
    python scripts/record_peft_golden.py
Writes, for each case, the model, the adapter as PEFT saves it, and `merged.safetensors`, the
weights after PEFT's own merge.
"""

import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

MADE_BY = {"made_by": "python scripts/record_peft_golden.py, with peft 0.21.2"}
OUT = Path(__file__).parents[1] / "tests" / "golden" / "peft"


def llama() -> LlamaForCausalLM:
    """A Llama of 2 layers, hidden size 16, untied."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=24,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
        )
    )


def gpt2() -> GPT2LMHeadModel:
    """A GPT-2 of 1 layer, hidden size 16, untied; its linear layers store inputs first."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=24,
            n_positions=12,
            n_embd=16,
            n_layer=1,
            n_head=2,
            tie_word_embeddings=False,
        )
    )


CASES = {
    "llama": (
        llama,
        LoraConfig(
            r=3,
            lora_alpha=5,
            use_rslora=True,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2, "^model.layers.0.*down_proj": 4},
            alpha_pattern={"v_proj": 7},
            modules_to_save=["norm", "lm_head"],
        ),
    ),
    "gpt2": (
        gpt2,
        LoraConfig(
            r=2,
            lora_alpha=6,
            target_modules=["wte", "c_attn", "attn.c_proj", "lm_head"],
            alpha_pattern={"c_attn": 3},
        ),
    ),
}


def record(name: str) -> None:
    """Write one case."""
    make, config = CASES[name]
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(11)
    model = make().eval()
    model.save_pretrained(folder / "base")
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.peft_config["default"].base_model_name_or_path = "org/base"
    adapted.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    merged = adapted.merge_and_unload().state_dict()
    tensors = {key: value.contiguous() for key, value in merged.items()}
    save_file(tensors, folder / "merged.safetensors", MADE_BY)


if __name__ == "__main__":
    for case in CASES:
        record(case)
