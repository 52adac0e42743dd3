"""Layers and roles, on the parameter names of real architectures and on made-up ones."""

import pytest
import torch

from evomerge.checkpoints.architecture import embedding_and_head, is_leftover, layout_of
from evomerge.checkpoints.fingerprint import fingerprint
from evomerge.checkpoints.reader import open_checkpoint
from evomerge.errors import CheckpointError
from tests.checkpoints.conftest import save

SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 16, "n_embd": 8, "n_layer": 3, "n_head": 2}
OPT = SIZES | {"ffn_dim": 8, "word_embed_proj_dim": 4}
PLAIN = {
    "model.embed_tokens.weight": "embed",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
}
FAMILIES = {
    "llama": (SIZES, "model.layers.", PLAIN),
    "mistral": (SIZES, "model.layers.", PLAIN),
    "qwen2": (SIZES, "model.layers.", PLAIN),
    "qwen3": (SIZES, "model.layers.", PLAIN),
    "gemma2": (SIZES, "model.layers.", PLAIN),
    "phi3": (SIZES, "model.layers.", PLAIN),
    "mixtral": (SIZES | {"num_local_experts": 2}, "model.layers.", PLAIN),
    "gpt2": (
        GPT2,
        "transformer.h.",
        {
            "transformer.wte.weight": "embed",
            "transformer.wpe.weight": "embed",
            "transformer.ln_f.weight": "norm",
            "transformer.ln_f.bias": "norm",
            "lm_head.weight": "head",
        },
    ),
    "gpt_neox": (
        SIZES,
        "gpt_neox.layers.",
        {
            "gpt_neox.embed_in.weight": "embed",
            "gpt_neox.final_layer_norm.weight": "norm",
            "gpt_neox.final_layer_norm.bias": "norm",
            "embed_out.weight": "head",
        },
    ),
    "opt": (
        OPT,
        "model.decoder.layers.",
        {
            "model.decoder.embed_tokens.weight": "embed",
            "model.decoder.embed_positions.weight": "embed",
            "model.decoder.final_layer_norm.weight": "norm",
            "model.decoder.final_layer_norm.bias": "norm",
            "model.decoder.project_in.weight": "embed",
            "model.decoder.project_out.weight": "head",
            "lm_head.weight": "head",
        },
    ),
    "bloom": (
        {"vocab_size": 16, "hidden_size": 8, "n_layer": 3, "n_head": 2},
        "transformer.h.",
        {
            "transformer.word_embeddings.weight": "embed",
            "transformer.word_embeddings_layernorm.weight": "embed",
            "transformer.word_embeddings_layernorm.bias": "embed",
            "transformer.ln_f.weight": "norm",
            "transformer.ln_f.bias": "norm",
            "lm_head.weight": "head",
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_family_has_its_layer_or_role(family, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    settings, prefix, outside = FAMILIES[family]
    config = AutoConfig.for_model(family, **settings, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    names = open_checkpoint(tmp_path).names()
    layout = layout_of(names)
    assert (layout.num_layers, layout.layer_prefix) == (3, prefix)
    assert {name: role for role, name in layout.outside} == outside
    assert [name for _, name in layout.outside] == [name for name in names if name in outside]
    assert {layout.layer_of(name) for name in names} == {None, 0, 1, 2}
    # the hub holds GPT-2 and OPT without the first word of these names
    stripped = [
        name.partition(".")[2] if name.startswith(("transformer.", "model.")) else name
        for name in names
    ]
    bare = layout_of(stripped)
    assert bare.layer_prefix == prefix.removeprefix("transformer.").removeprefix("model.")
    assert {role for role, _ in bare.outside} == {role for role, _ in layout.outside}
    assert len(bare.outside) == len(layout.outside)


def test_the_language_model_is_found_among_several_towers():
    vision = [f"model.visual.blocks.{n}.{part}.weight" for n in range(9) for part in "abcd"]
    text = [f"model.language_model.layers.{n}.mlp.weight" for n in range(2)]
    roles = {
        "model.visual.merger.norm.weight": "embed",
        "model.visual.patch_embed.weight": "embed",
        "model.language_model.embed_tokens.weight": "embed",
        "model.language_model.norm.weight": "norm",
        "lm_head.weight": "head",
    }
    layout = layout_of([*vision, *text, *roles])
    assert (layout.num_layers, layout.layer_prefix) == (2, "model.language_model.layers.")
    assert {name: role for role, name in layout.outside} == roles | dict.fromkeys(vision, "embed")


def test_experts_are_not_layers():
    names = [f"model.layers.{n}.mlp.experts.{e}.w1.weight" for n in range(2) for e in range(8)]
    assert layout_of(names).num_layers == 2


def test_an_unknown_family_is_covered_by_the_general_rule():
    names = ["net.0.w", "net.1.w", "net.final_norm.w", "net.strange.w", "tokens.w", "output.weight"]
    layout = layout_of(names)
    assert (layout.num_layers, layout.layer_prefix) == (2, "net.")
    assert layout.outside == (
        ("norm", "net.final_norm.w"),
        ("embed", "net.strange.w"),
        ("embed", "tokens.w"),
        ("head", "output.weight"),
    )


def test_layers_beyond_the_config_count_and_missing_ones_are_named():
    names = [f"model.layers.{n}.w" for n in (0, 1, 3)]
    with pytest.raises(
        CheckpointError, match=r"^model.layers.2: has no tensors, but the model has 4 layers"
    ):
        layout_of(names)
    with pytest.raises(
        CheckpointError, match=r"^model.layers.2: has no tensors, but the model has 3 layers"
    ):
        layout_of(names[:2], num_layers=3)
    assert layout_of(names[:2], num_layers=2).num_layers == 2
    assert layout_of(names[:2], num_layers=1).num_layers == 2


def test_a_model_without_layers_is_refused():
    with pytest.raises(CheckpointError, match=r"^embed.weight: no tensor name has a layer number"):
        layout_of(["embed.weight"])
    with pytest.raises(CheckpointError, match=r"^no tensor: no tensor name has a layer number"):
        layout_of([])


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["model.embed_tokens.weight", "lm_head.weight"], (0, 1)),
        (["transformer.wte.weight", "transformer.wpe.weight"], (0, None)),
        (["gpt_neox.embed_in.weight", "embed_out.weight", "embed_out.bias"], (0, 1)),
        (["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"], (None, None)),
    ],
)
def test_embedding_and_head_are_named_where_there_is_one(names, found):
    assert embedding_and_head(names) == tuple(None if i is None else names[i] for i in found)


def test_a_stack_of_another_tower_is_not_the_layers_even_if_it_is_larger():
    text = [f"model.layers.{n}.mlp.weight" for n in range(2)]
    image = [f"model.image_embed.img_processor.encoder.layers.{n}.mlp.weight" for n in range(9)]
    layout = layout_of([*image, *text])
    assert (layout.num_layers, layout.layer_prefix) == (2, "model.layers.")
    assert layout.outside == tuple(("embed", name) for name in image)


@pytest.mark.parametrize(
    ("name", "shape", "leftover"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (64,), True),
        ("gpt_neox.layers.0.attention.rotary_emb.inv_freq", (8,), True),
        ("gpt_neox.layers.0.attention.masked_bias", (), True),
        ("h.0.attn.masked_bias", (), True),
        ("h.0.attn.bias", (1, 1, 1024, 1024), True),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 2048, 2048), True),
        ("transformer.h.0.attn.causal_mask", (1, 1, 2048, 2048), True),
        ("h.0.attn.bias", (1024,), False),
        ("h.0.attn.c_attn.bias", (3072,), False),
        ("gpt_neox.layers.0.attention.dense.bias", (64,), False),
        ("model.rotary_emb.inv_freqs.weight", (64,), False),
    ],
)
def test_constants_that_older_versions_stored_are_told_from_weights(name, shape, leftover):
    assert is_leftover(name, shape) is leftover


def test_leftovers_are_not_part_of_a_checkpoint(tmp_path):
    weights = {"gpt_neox.layers.0.attention.dense.bias": torch.ones(4)}
    leftover = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-torch.inf, dtype=torch.float16),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
    }
    old, new = save(tmp_path / "old", [weights | leftover]), save(tmp_path / "new", [weights])
    assert open_checkpoint(old).names() == open_checkpoint(new).names() == tuple(weights)
    assert fingerprint(old) == fingerprint(new)
