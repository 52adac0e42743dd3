"""Tiny random models of many families, as transformers saves them."""

import torch

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 4}
GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", HEADS),
    "gemma2": ("gemma2", {**HEADS, "sliding_window": 4, "query_pre_attn_scalar": 4}),
    "gemma3": (
        "gemma3_text",
        {
            **HEADS,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", GPT2),
    "gpt2_untied": ("gpt2", {**GPT2, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **HEADS,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [1],
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
}
"""Label -> model type and settings that differ from `SIZES`."""


def make_family(label, seed, folder=None, dtype=torch.float32, **changes):
    """A random model; all models of a label share the one of seed 0, and differ a little from it.

    Every parameter is random, biases and norms too. The global generator is left as it was.

    Args:
        label: A key of `FAMILIES`.
        seed: Decides the difference; 0 is the base.
        folder: Where to save it; None does not save.
        dtype: Of all weights.
        changes: Fields of the model's config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = FAMILIES[label]
    settings = {**SIZES, **settings, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
        _shift(model, 0.2)
        torch.manual_seed(1000 + seed)
        _shift(model, 0.05 if seed else 0.0)
    model = model.to(dtype).eval()
    if folder is not None:
        model.save_pretrained(folder)
    return model


def _shift(model, scale):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape))
