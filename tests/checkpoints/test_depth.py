"""A restacked model's config says of each layer what it said where the layer came from."""

import pytest
from transformers import AutoConfig

from evomerge.checkpoints.depth import with_depth
from evomerge.errors import MergeError

LAYERS = [0, 1, 2, 1, 2, 3]


def config_of(model_type, **settings):
    """A config.json as older files are: without what transformers derives from positions."""
    config = AutoConfig.for_model(model_type, **settings).to_dict()
    return {name: value for name, value in config.items() if name != "layer_types"}


@pytest.mark.parametrize(
    ("model_type", "settings", "key"),
    [
        ("llama", {"num_hidden_layers": 4}, "num_hidden_layers"),
        ("phi3", {"num_hidden_layers": 4}, "num_hidden_layers"),
        ("mixtral", {"num_hidden_layers": 4}, "num_hidden_layers"),
        ("gpt_neox", {"num_hidden_layers": 4}, "num_hidden_layers"),
        ("gpt2", {"n_layer": 4}, "n_layer"),
    ],
)
def test_a_family_without_lists_changes_its_depth_and_nothing_else(model_type, settings, key):
    config = config_of(model_type, **settings)
    assert with_depth(config, LAYERS) == {**config, key: 6}
    assert config[key] == 4


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("written", [True, False], ids=["written", "derived"])
def test_a_layer_keeps_its_attention(family, written):
    settings = {"num_hidden_layers": 8}
    if family.startswith("qwen"):
        settings |= {"use_sliding_window": True, "max_window_layers": 2}
    config = config_of(family, **settings)
    kinds = AutoConfig.for_model(**config).layer_types
    if written:
        config["layer_types"] = kinds
    layers = [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]
    new = with_depth(config, layers)
    assert new["layer_types"] == [kinds[layer] for layer in layers]
    assert AutoConfig.for_model(**new).layer_types == new["layer_types"]


def test_no_list_depends_on_the_order_or_number_of_uses():
    config = config_of("gemma2", num_hidden_layers=3)
    kinds = AutoConfig.for_model(**config).layer_types
    assert with_depth(config, [2])["layer_types"] == [kinds[2]]
    assert with_depth({**config, "layer_types": None}, [2])["layer_types"] == [kinds[2]]
    assert with_depth(config, [1, 1, 0])["layer_types"] == [kinds[1], kinds[1], kinds[0]]


def test_windows_are_counted_from_the_first_layer_on():
    config = config_of("qwen2", num_hidden_layers=4, max_window_layers=4)
    assert with_depth(config, LAYERS)["max_window_layers"] == 6
    assert with_depth({**config, "max_window_layers": 2}, LAYERS)["max_window_layers"] == 2


@pytest.mark.parametrize(
    ("said", "dense"),
    [
        ({"mlp_only_layers": [1]}, [1, 3]),
        ({"decoder_sparse_step": 2}, [0, 2, 4]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [0, 1, 2, 3, 4]),
        ({}, []),
    ],
)
def test_a_layer_keeps_its_experts(said, dense):
    new = with_depth(config_of("qwen3_moe", num_hidden_layers=4, **said), LAYERS)
    assert (new["decoder_sparse_step"], new["mlp_only_layers"]) == (1, dense)


def test_leading_dense_layers_must_stay_in_front():
    config = config_of("deepseek_v3", num_hidden_layers=4, first_k_dense_replace=2)
    assert with_depth(config, [0, 1, 1, 2, 3])["first_k_dense_replace"] == 3
    with pytest.raises(
        MergeError, match=r"^config.json: first_k_dense_replace: 2 says by position"
    ):
        with_depth(config, [0, 1, 2, 1])


def test_layers_of_a_period_may_move_by_the_period_only():
    config = {"model_type": "unheard_of", "num_hidden_layers": 8, "attn_layer_period": 4}
    assert with_depth(config, [0, 1, 2, 3, 0, 1, 2, 3])["num_hidden_layers"] == 8
    with pytest.raises(MergeError, match=r"attn_layer_period: 4 .* layer 1 .* at position 3"):
        with_depth(config, [0, 1, 2, 1])


def test_a_model_type_that_transformers_lacks_is_changed_by_what_is_written():
    config = {
        "architectures": ["UnheardOf"],
        "n_layers": 1,
        "eos_token_id": [2],
        "kinds_of_layer": ["wide"],
    }
    assert with_depth(config, [0, 0]) == {
        "architectures": ["UnheardOf"],
        "n_layers": 2,
        "eos_token_id": [2],
        "kinds_of_layer": ["wide", "wide"],
    }


def test_the_language_model_is_the_part_with_layers():
    config = {"vision_config": {"num_hidden_layers": 9}, "text_config": {"num_hidden_layers": 2}}
    new = with_depth(config, [0, 1, 1])
    assert new == {
        "vision_config": {"num_hidden_layers": 9},
        "text_config": {"num_hidden_layers": 3},
    }


@pytest.mark.parametrize("layers", [[], [0, 4], [-1]])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(MergeError, match=r"^config.json: layers .* the model has layers 0 to 3"):
        with_depth(config_of("llama", num_hidden_layers=4), layers)


def test_a_config_without_a_depth_is_refused():
    with pytest.raises(MergeError, match=r"^config.json: has none of num_hidden_layers, n_layer"):
        with_depth({"model_type": "unheard_of"}, [0])
