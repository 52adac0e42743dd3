"""The live model: as its folder says, or of another depth and vocabulary without reading weights."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.depth import with_depth
from evomerge.errors import CheckpointError
from evomerge.merging.places import live_views
from evomerge.workers.live_model import load_live_model
from tests.families import FAMILIES, make_family

TOKENS = torch.tensor([[1, 5, 9, 30, 7, 7, 12, 2, 3, 31, 8, 4]])
LAYERS = [0, 1, 1, 2]


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("label", FAMILIES)
def test_a_model_built_without_weights_computes_as_a_loaded_one(label, tmp_path):
    dtype = torch.bfloat16
    make_family(label, 0, tmp_path / "three", dtype)
    config = with_depth(config_of(tmp_path / "three"), LAYERS)
    model = load_live_model(tmp_path / "three", dtype, None, "cpu", config)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(model.config, dtype=dtype).save_pretrained(tmp_path / "four")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "four", dtype=dtype).eval()
    for name, tensor in loaded.state_dict().items():
        model.state_dict()[name].copy_(tensor)
    assert torch.equal(logits(model), logits(loaded))
    buffers, expected = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, tensor in expected.items():
        assert buffers[name].dtype is tensor.dtype
        assert torch.equal(buffers[name], tensor), name


def test_every_parameter_of_a_built_model_can_be_overwritten_and_ties_hold(tmp_path):
    make_family("gemma2", 0, tmp_path)
    changes = {**with_depth(config_of(tmp_path), [0, 1]), "vocab_size": 40}
    model = load_live_model(tmp_path, torch.float32, None, "cpu", changes)
    assert model.model.embed_tokens.weight.shape == (40, 16)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    names = [name for name in model.state_dict() if name != "lm_head.weight"]
    for view in live_views(model, names).values():
        view.fill_(0.5)
    assert all((parameter == 0.5).all() for parameter in model.parameters())


def test_the_generation_config_of_the_folder_goes_along(tmp_path):
    make_family("llama", 0, tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 7}))
    for changes in (None, {"num_hidden_layers": 1}):
        model = load_live_model(tmp_path, torch.float32, None, "cpu", changes)
        assert model.generation_config.max_new_tokens == 7
        assert len(model.model.layers) == (1 if changes else 3)


def test_no_weight_is_read_for_another_depth(tmp_path):
    make_family("llama", 0, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model = load_live_model(tmp_path, torch.bfloat16, "eager", "cpu", {"num_hidden_layers": 5})
    assert (len(model.model.layers), model.dtype) == (5, torch.bfloat16)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(CheckpointError, match="transformers cannot load this model"):
        load_live_model(tmp_path, torch.bfloat16, None, "cpu")


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "wide"}, {"model_type": "unheard_of"}, {"layer_types": ["odd"]}]
)
def test_changes_that_are_no_model_are_told_in_a_sentence(changes, tmp_path):
    make_family("gemma2", 0, tmp_path)
    with pytest.raises(CheckpointError, match=r"transformers cannot load this model \(.+\)\.$"):
        load_live_model(tmp_path, torch.float32, None, "cpu", changes)
