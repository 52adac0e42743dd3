"""Sidecars: each file from its donor, the config with the merge's dtype, nothing else."""

import json

import pytest

from evomerge.checkpoints.sidecars import Sidecars, copy_sidecars
from evomerge.errors import CheckpointError
from tests.checkpoints.conftest import llama_config

TOKENIZER = ["tokenizer.json", "special_tokens_map.json", "merges.txt", "spiece.model"]
TEMPLATES = ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
STAYS = ["model.safetensors", "README.md", "pytorch_model.bin", "training_args.json"]


def model(folder, config, **files):
    folder.mkdir()
    (folder / "additional_chat_templates").mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ["generation_config.json", *TOKENIZER, *TEMPLATES, *STAYS]:
        (folder / name).write_text(f"{name} of {folder.name}")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def texts(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "config.json"
    }


def test_each_file_comes_from_its_donor_and_weights_stay(tmp_path, out):
    base = model(tmp_path / "base", {"model_type": "llama"})
    chat = model(tmp_path / "chat", {"model_type": "other"}, tokenizer_config__json="{}")
    record = copy_sidecars(base, chat, out, dtype=None)
    names = [*TOKENIZER, *TEMPLATES]
    expected = {name: f"{name} of chat" for name in names} | {"tokenizer_config.json": "{}"}
    assert texts(out) == expected | {"generation_config.json": "generation_config.json of base"}
    assert json.loads((out / "config.json").read_text()) == {"model_type": "llama"}
    assert record == Sidecars(
        base, ("config.json", "generation_config.json"), chat, tuple(sorted(expected))
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"a": 1}, {"a": 1, "dtype": "float16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "float16"}),
        (
            {"dtype": "float32", "torch_dtype": "float32"},
            {"dtype": "float16", "torch_dtype": "float16"},
        ),
        (
            {
                "dtype": "float32",
                "text_config": {"dtype": "bfloat16", "b": 2},
                "x_config": {"c": 3},
            },
            {"dtype": "float16", "text_config": {"dtype": "float16", "b": 2}, "x_config": {"c": 3}},
        ),
        # Emu3 has a vocabulary with a token of that name
        (
            {"dtype": "x", "vocabulary_map": {"dtype": 7}},
            {"dtype": "float16", "vocabulary_map": {"dtype": 7}},
        ),
    ],
)
def test_the_config_says_the_dtype_of_the_merge(tmp_path, out, config, expected):
    base = model(tmp_path / "base", config)
    copy_sidecars(base, base, out, dtype="float16")
    assert json.loads((out / "config.json").read_text()) == expected
    assert json.loads((base / "config.json").read_text()) == config


def test_transformers_reads_the_same_config_but_for_the_dtype(tmp_path, out):
    from transformers import AutoConfig

    config = llama_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    config.save_pretrained(tmp_path / "base")
    copy_sidecars(tmp_path / "base", tmp_path / "base", out, dtype="bfloat16")
    before = AutoConfig.from_pretrained(tmp_path / "base").to_dict()
    after = AutoConfig.from_pretrained(out).to_dict()
    assert str(after["dtype"]) in ("bfloat16", "torch.bfloat16")
    for settings in (before, after):
        settings.pop("dtype"), settings.pop("_name_or_path", None)
    assert after == before


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"vocab_size": 5}, {"vocab_size": 9}),
        ({}, {"vocab_size": 9}),
        (
            {"text_config": {"vocab_size": 5}, "audio_config": {"vocab_size": 3}},
            {"text_config": {"vocab_size": 9}, "audio_config": {"vocab_size": 3}},
        ),
        (
            {"vocab_size": 5, "text_config": {"b": 1}},
            {"vocab_size": 9, "text_config": {"b": 1, "vocab_size": 9}},
        ),
    ],
)
def test_the_config_says_the_size_of_the_vocabulary(tmp_path, out, config, expected):
    base = model(tmp_path / "base", config)
    copy_sidecars(base, base, out, dtype=None, vocab_size=9)
    assert json.loads((out / "config.json").read_text()) == expected


def test_token_ids_follow_the_vocabulary(tmp_path, out):
    base = model(tmp_path / "base", {"eos_token_id": 2, "bos_token_id": 1, "a": 1})
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 3], "top_p": 0.9}')
    other = model(tmp_path / "other", {"eos_token_id": 7, "pad_token_id": 8, "a": 2})
    (other / "generation_config.json").write_text('{"eos_token_id": [7, 8], "top_p": 0.5}')
    copy_sidecars(base, other, out, dtype=None, numbered_by=other)
    config = json.loads((out / "config.json").read_text())
    assert config == {"eos_token_id": 7, "bos_token_id": 1, "a": 1}
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [7, 8], "top_p": 0.9}
    (other / "generation_config.json").unlink()
    copy_sidecars(base, other, out, dtype=None, numbered_by=other)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 3], "top_p": 0.9}


def test_code_goes_along_only_where_the_config_refers_to_it(tmp_path, out):
    plain = model(tmp_path / "plain", {}, modeling_x__py="plain")
    assert "modeling_x.py" not in copy_sidecars(plain, plain, out, dtype=None).config_files
    own = model(tmp_path / "own", {"auto_map": {}}, modeling_x__py="own", helper__py="own")
    (out / "own").mkdir()
    record = copy_sidecars(own, plain, out / "own", dtype=None)
    assert {"modeling_x.py", "helper.py"} <= set(record.config_files)
    assert (out / "own" / "modeling_x.py").read_text() == "own"


def test_code_of_two_donors_under_one_name_is_refused(tmp_path, out):
    settings = '{"auto_map": {}}'
    base = model(tmp_path / "base", {"auto_map": {}}, code__py="1")
    same = model(tmp_path / "same", {}, code__py="1", tokenizer_config__json=settings)
    assert "code.py" in copy_sidecars(base, same, out, dtype=None).tokenizer_files
    other = model(tmp_path / "other", {}, code__py="2", tokenizer_config__json=settings)
    with pytest.raises(CheckpointError, match=r"other: its code.py differs from the one"):
        copy_sidecars(base, other, tmp_path, dtype=None)


def test_a_donor_without_config_or_tokenizer(tmp_path, out):
    (tmp_path / "bare").mkdir()
    with pytest.raises(CheckpointError, match=r"bare: config.json cannot be read"):
        copy_sidecars(tmp_path / "bare", tmp_path / "bare", out, dtype=None)
    (tmp_path / "bare" / "config.json").write_text("{}")
    record = copy_sidecars(tmp_path / "bare", tmp_path / "bare", out, dtype=None)
    assert record.tokenizer_files == ()
    (tmp_path / "bare" / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json is not JSON"):
        copy_sidecars(tmp_path / "bare", tmp_path / "bare", out, dtype=None)
