"""Merges of models with different vocabularies, as whole folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.config.recipe import Recipe
from evomerge.errors import MergeError
from evomerge.merging.run import merge
from tests.tiny import make_model

MODELS = Path(__file__).parents[1] / "golden" / "mergekit_vocab" / "models"


def recipe_of(folder, *names, base=None, **fields):
    models = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in names]
    data = {"merge_method": "linear", "models": models, "dtype": "float32", **fields}
    if base:
        data |= {"merge_method": "task_arithmetic", "base_model": str(folder / base)}
    return Recipe.model_validate_json(json.dumps(data))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_union_is_a_complete_model(tmp_path):
    union = {"source": "union", "pad_to_multiple_of": 8}
    recipe = recipe_of(
        MODELS, "math", "code", base="start", tokenizer=union, chat_template="chatml"
    )
    merge(recipe, tmp_path / "out")
    model, tokenizer = load(tmp_path / "out")
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 24
    assert len(tokenizer) == 23
    assert "<|im_start|>" in tokenizer.chat_template
    ids = tokenizer("abcdexya<tool>", return_tensors="pt").input_ids
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["abc", "de", "xya", "<tool>"]
    assert model(ids).logits.isfinite().all()
    record = json.loads((tmp_path / "out" / "evomerge.json").read_text())
    assert "tokenizer.json" in record["tokenizer_files"]


def test_the_numbers_in_the_config_follow_the_tokenizer(tmp_path):
    for name in ("start", "math"):
        shutil.copytree(MODELS / name, tmp_path / name)
    path = tmp_path / "math" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 16}))
    recipe = recipe_of(tmp_path, "math", base="start", tokenizer_source=str(tmp_path / "math"))
    merge(recipe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 16


def test_different_vocabularies_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(MergeError, match=r"math has 17 rows, base .*start has 16"):
        merge(recipe_of(MODELS, "math", base="start"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_other_numbers_moves_the_rows(tmp_path):
    """The source is not merged itself; every token has its row still, bit by bit."""
    for seed, name in enumerate(("a", "b")):
        make_model(seed, tmp_path / name)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    path = tmp_path / "moved" / "tokenizer.json"
    stored = json.loads(path.read_text())
    numbers = stored["model"]["vocab"]
    numbers["e"], numbers["q"] = numbers["q"], numbers["e"]
    path.write_text(json.dumps(stored))
    found = []
    for name, source in (("plain", None), ("other", str(tmp_path / "moved"))):
        merge(recipe_of(tmp_path, "a", "b", tokenizer_source=source), tmp_path / name)
        model, tokenizer = load(tmp_path / name)
        ids = tokenizer("the quick brown fox", return_tensors="pt").input_ids
        found.append((ids, model.get_input_embeddings()(ids), model.lm_head.weight[ids]))
    (plain, *plain_rows), (moved, *moved_rows) = found
    assert not torch.equal(plain, moved)
    assert all(map(torch.equal, plain_rows, moved_rows))
