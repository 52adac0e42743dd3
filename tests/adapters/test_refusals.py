"""Adapters that are not plain LoRA, or not of this model: one sentence each."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.adapters.open import open_model
from evomerge.checkpoints.locate import locate
from evomerge.errors import CheckpointError
from tests.adapters.small import layer, make_adapter, reference, write_adapter_files
from tests.tiny import make_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    make_model(0, folder)
    return folder


def refused(base, adapter, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        open_model(reference(base, adapter))
    assert str(base) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, r"use_dora: True \(DoRA"),
        ({"peft_type": "IA3"}, "peft_type: 'IA3'"),
        ({"peft_type": "LOHA"}, "peft_type: 'LOHA'"),
        ({"lora_bias": True}, "lora_bias: True"),
        ({"bias": "all"}, "bias: 'all'"),
        ({"bias": "lora_only"}, "bias: 'lora_only'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "replicated layers"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "bare parameters"),
        ({"trainable_token_indices": [1]}, "token rows"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model's own weights"),
        ({"init_lora_weights": "loftq"}, "changes the model's own weights"),
    ],
)
def test_other_kinds_are_refused_by_name(base, tmp_path, fields, words):
    make_adapter(tmp_path, base, 1, {layer(0): 4}, **fields)
    refused(base, tmp_path, f"{words}.*not supported")


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva"])
def test_starts_that_leave_the_model_alone_are_read(base, tmp_path, start):
    make_adapter(tmp_path, base, 1, {layer(0): 4}, init_lora_weights=start)
    assert list(open_model(reference(base, tmp_path)).adapter.low_rank) == [f"{layer(0)}.weight"]


@pytest.mark.parametrize(
    "fields", [{"r": 0}, {"r": "4"}, {"lora_alpha": "big"}, {"rank_pattern": {"(": 2}}]
)
def test_configs_that_peft_would_not_write(base, tmp_path, fields):
    make_adapter(tmp_path, base, 1, {layer(0): 4}, **fields)
    refused(base, tmp_path, "PEFT would not write")


def rewritten(base, folder, change):
    make_adapter(folder, base, 1, {layer(0): 4})
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


A, B = (f"base_model.model.{layer(0)}.lora_{x}.weight" for x in "AB")


def test_a_target_of_another_shape_names_model_tensor_and_both_shapes(base, tmp_path):
    rewritten(base, tmp_path, lambda tensors: tensors.update({B: torch.ones(48, 4)}))
    refused(
        base,
        tmp_path,
        rf"{layer(0)}\.weight: adapter .* is for \(48, 32\), .*base has \(32, 32\) in float32",
    )


def test_a_target_that_the_model_has_not_names_the_nearest(base, tmp_path):
    renamed = A.replace("q_proj", "q_prod"), B.replace("q_proj", "q_prod")
    rewritten(
        base,
        tmp_path,
        lambda tensors: [
            tensors.update({new: tensors.pop(old)})
            for old, new in zip((A, B), renamed, strict=True)
        ],
    )
    refused(base, tmp_path, rf"is for .*q_prod\.weight, which .* has not.*{layer(0)}\.weight")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(A),
        lambda tensors: tensors.update({A: torch.ones(3, 32)}),
        lambda tensors: tensors.update({A: torch.ones(4, 32, 1, 1), B: torch.ones(32, 4, 1, 1)}),
    ],
    ids=["no A", "other rank", "convolution"],
)
def test_factors_that_do_not_fit_each_other(base, tmp_path, change):
    rewritten(base, tmp_path, change)
    refused(base, tmp_path, rf"{layer(0)} has LoRA factors of shapes .* rank 4")


@pytest.mark.parametrize("part", ["lora_magnitude_vector", "lora_B.bias"])
def test_tensors_of_other_kinds_are_refused(base, tmp_path, part):
    key = f"base_model.model.{layer(0)}.{part}"
    rewritten(base, tmp_path, lambda tensors: tensors.update({key: torch.ones(32)}))
    refused(base, tmp_path, rf"is for {layer(0)}\.{part}, which")


def test_integers_and_empty_files_are_refused(base, tmp_path):
    rewritten(base, tmp_path / "i", lambda tensors: tensors.update({A: torch.ones(4, 32).int()}))
    refused(base, tmp_path / "i", "is int32; adapters of float32")
    write_adapter_files(tmp_path / "e", {}, {"peft_type": "LORA"})
    refused(base, tmp_path / "e", "holds no tensors")


def test_two_parts_for_one_tensor_are_refused(base, tmp_path):
    make_adapter(tmp_path, base, 1, {layer(0): 4})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors |= {
        key.replace("model.model.model", "model.model"): t.clone() for key, t in tensors.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    refused(base, tmp_path, "has two parts for")


def test_an_adapter_of_the_bare_model_finds_its_tensors(base, tmp_path):
    """AutoModel has no `model.` in front of its names."""
    make_adapter(tmp_path / "a", base, 1, {layer(0): 4})
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    short = {key.replace("model.model.model", "model.model"): t for key, t in tensors.items()}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    write_adapter_files(tmp_path / "b", short, config)
    one, other = (open_model(reference(base, tmp_path / x)) for x in "ab")
    assert torch.equal(one.read(f"{layer(0)}.weight"), other.read(f"{layer(0)}.weight"))
    assert not torch.equal(one.read(f"{layer(0)}.weight"), one.base.read(f"{layer(0)}.weight"))


def test_folders_that_hold_no_adapter(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        open_model(reference(base, base))
    with pytest.raises(CheckpointError, match="no such folder"):
        open_model(reference(base, tmp_path / "none"))
    make_adapter(tmp_path / "a", base, 1, {layer(0): 4})
    with pytest.raises(CheckpointError, match=r"It holds an adapter: write model\+adapter"):
        locate(reference(tmp_path / "a"))
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    refused(base, tmp_path / "a", "holds no adapter_model.safetensors or adapter_model.bin")


def test_a_truncated_file_is_refused(base, tmp_path):
    make_adapter(tmp_path, base, 1, {layer(0): 4})
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    refused(base, tmp_path, "8 bytes short of its header")
