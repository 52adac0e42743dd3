"""Vocabularies: rows as mergekit 0.1.5 fills them (scripts/record_vocab_golden.py), and refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.chat_templates import CHAT_TEMPLATES, read_chat_template
from evomerge.checkpoints.fingerprint import digest_of
from evomerge.checkpoints.reader import open_checkpoint
from evomerge.checkpoints.source import MemorySource
from evomerge.checkpoints.vocabulary import load_tokenizer
from evomerge.config.mergekit import read_recipe
from evomerge.config.tokenizer import TokenizerConfig
from evomerge.errors import MergeError
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.execute import merged_tensors
from evomerge.merging.live import write_live
from evomerge.merging.plan import make_plan
from evomerge.merging.vocabulary import align, fit_vocabulary

GOLDEN = Path(__file__).parents[1] / "golden" / "mergekit_vocab"
RECIPES = sorted((GOLDEN / "recipes").glob("*.yaml"))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def open_models(*names):
    folders = {name: GOLDEN / "models" / name for name in names}
    return folders, {name: open_checkpoint(folder, name) for name, folder in folders.items()}


def vocabulary_of(recipe):
    folders, sources = open_models(*map(str, recipe.references()))
    return align(
        recipe.tokenizer,
        recipe.tokenizer_source,
        recipe.chat_template,
        folders,
        sources,
        str(recipe.base_model) if recipe.base_model else None,
        str(recipe.donor),
    )


def aligned(names, base=None, chat_template=None, **section):
    folders, sources = open_models(*names)
    config = TokenizerConfig.model_validate(section) if section else None
    return align(config, None, chat_template, folders, sources, base, base or names[0])


def rows_of(vocabulary):
    """Token → number of the merge, as transformers reads the tokenizer that goes with it."""
    return load_tokenizer(vocabulary.tokenizer_folder).get_vocab()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_agrees_with_mergekit(path):
    """Row by row of one token, as mergekit's order of new tokens changes from run to run.

    Both round in float32, some ten operations each: 16 roundings of the largest element. The mean
    that pads is over rows in another order.
    """
    recipe = read_recipe(path)
    vocabulary = vocabulary_of(recipe)
    sources = vocabulary.sources
    plan = make_plan(recipe, sources, layout_of(sources[str(recipe.donor)].names()))
    ours = merged_tensors(plan, sources, StatisticsCache())
    theirs = load_file(GOLDEN / "merged.safetensors")
    tokens = json.loads((GOLDEN / "rows.json").read_text())[path.stem]
    numbers = rows_of(vocabulary)
    # <unused> has no row in `short`, so it is left out here; mergekit adds it again on loading
    tokens = [token for token in tokens if token != "<unused>"]
    assert numbers.keys() == set(tokens)
    for name in (EMBEDDING, HEAD):
        expected = theirs[f"{path.stem}/{name}"]
        order = [numbers[token] for token in tokens] + list(range(len(tokens), len(expected)))
        limit = 16 * 2.0**-24 * expected.abs().max()
        assert ours[name].shape == expected.shape
        assert (ours[name][order] - expected).abs().max() <= limit
    assert vocabulary.size == len(theirs[f"{path.stem}/{EMBEDDING}"])


def test_the_recipes_cover_every_way_of_filling():
    """Without a token in each case the comparison above would not see it."""
    start, math, code = (rows_of(aligned([name])) for name in ("start", "math", "code"))
    assert start.keys() & math.keys() & code.keys()
    assert code.keys() - start.keys() - math.keys()
    assert (math.keys() & code.keys()) - start.keys()
    assert [token for token in start if token in math and start[token] != math[token]]


def test_models_that_agree_are_left_as_they_are():
    for section in ({}, {"source": "base"}, {"source": "union"}, {"source": "math"}):
        folders, sources = open_models("math")
        sources["copy"], folders["copy"] = sources["math"], folders["math"]
        config = TokenizerConfig.model_validate(section) if section else None
        vocabulary = align(config, None, None, folders, sources, None, "math")
        assert vocabulary.size is None
        assert vocabulary.sources is sources
        assert vocabulary.tokenizer_folder == folders["math"]


def test_one_numbering_in_files_that_differ_is_left_too(tmp_path):
    folders, sources = open_models("start")
    sources["copy"], folders["copy"] = (
        sources["start"],
        shutil.copytree(folders["start"], tmp_path / "copy"),
    )
    stored = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(stored))
    vocabulary = align(TokenizerConfig(), None, None, folders, sources, None, "start")
    assert vocabulary.sources is sources
    # its three rows beyond the last token stay
    assert sources["start"].shape(EMBEDDING)[0] == len(rows_of(vocabulary)) + 3


def test_different_vocabularies_need_a_setting():
    with pytest.raises(MergeError) as caught:
        aligned(["start", "math"], base="start")
    assert str(caught.value) == (
        "model.embed_tokens.weight: math has 17 rows, base start has 16, so their vocabularies "
        "differ. To merge row by row of the same token, add tokenizer_source: base (in a search, "
        "merge.tokenizer: base), or tokenizer: {source: union}."
    )


def test_different_numbers_need_a_setting_too():
    folders, sources = open_models("math")
    folders["code"], sources["code"] = GOLDEN / "models" / "code", sources["math"]
    with pytest.raises(MergeError, match=r"code has 18 tokens, math has 17, and 8 have .* 'a'\."):
        align(None, None, None, folders, sources, None, "math")


def test_the_merge_is_numbered_by_the_model_that_is_named():
    vocabulary = aligned(["start", "math"], base="start", source="math")
    assert vocabulary.tokenizer_folder == vocabulary.numbered_by == GOLDEN / "models" / "math"
    assert vocabulary.size == 17
    assert aligned(["start", "math"], base="start", source="base").numbered_by is None
    assert aligned(["start", "math"], base="start", source="union").numbered_by is None


def test_a_tokenizer_of_a_model_that_is_not_merged():
    code = str(GOLDEN / "models" / "code")
    vocabulary = aligned(["start", "math"], base="start", source=code)
    assert rows_of(vocabulary) == rows_of(aligned(["code"]))
    # nobody has x; a is at 3 in start and at 10 in math
    rows = vocabulary.sources["math"].read(EMBEDDING)
    assert not rows[rows_of(vocabulary)["x"]].any()
    _, sources = open_models("math")
    a = rows_of(aligned(["math"]))["a"]
    assert torch.equal(rows[rows_of(vocabulary)["a"]], sources["math"].read(EMBEDDING)[a])


def test_a_model_without_a_tokenizer_has_the_chosen_numbers(tmp_path):
    folders, sources = open_models("start", "math")
    folders["bare"], sources["bare"] = tmp_path, sources["start"]
    vocabulary = align(TokenizerConfig(), None, None, folders, sources, "start", "start")
    rows = [vocabulary.sources[name].read(EMBEDDING) for name in ("start", "bare")]
    assert torch.equal(*rows)
    with pytest.raises(MergeError, match=r"source bare is the tokenizer of bare, and .* has none"):
        align(TokenizerConfig(source="bare"), None, None, folders, sources, "start", "start")


@pytest.mark.parametrize(
    ("token", "setting", "sentence"),
    [
        ("a", {"source": "short"}, r"tokens: 'a': its source short is not merged here"),
        ("<tool>", {"source": "math"}, r"'<tool>': its source math has no token '<tool>'\. Name"),
        (
            "<new>",
            {"source": {"kind": "model_token", "model": "math", "token": "zz"}},
            r"'<new>': its source math has no token 'zz'",
        ),
        (
            "<new>",
            {"source": {"kind": "model_token", "model": "math", "token_id": 17}},
            r"'<new>': token_id 17 came, and math has rows 0 to 16",
        ),
    ],
)
def test_a_token_from_where_it_is_not(token, setting, sentence):
    with pytest.raises(MergeError, match=sentence):
        aligned(["math", "code"], source="union", tokens={token: setting})


def test_a_forced_token_needs_a_source():
    with pytest.raises(ValueError, match="force is true without a source"):
        TokenizerConfig.model_validate({"tokens": {"a": {"force": True}}})


def test_a_model_whose_embedding_is_not_known():
    odd = {"odd": MemorySource({"model.layers.0.w": torch.zeros(2)}, "odd")}
    folder = {"odd": GOLDEN / "models" / "math"}
    assert align(TokenizerConfig(), None, None, folder, odd, None, "odd").sources is odd
    with pytest.raises(MergeError, match="odd has no tensor that is known as its token embedding"):
        align(TokenizerConfig(pad_to_multiple_of=8), None, None, folder, odd, None, "odd")


def test_a_chat_template_is_written_beside_the_tokenizer():
    vocabulary = aligned(["start", "math"], chat_template="chatml", source="union")
    tokenizer = load_tokenizer(vocabulary.tokenizer_folder)
    assert tokenizer.chat_template == CHAT_TEMPLATES["chatml"]
    alone = aligned(["start"], chat_template="{{ messages }}")
    assert load_tokenizer(alone.tokenizer_folder).chat_template == "{{ messages }}"
    assert rows_of(alone) == rows_of(aligned(["start"]))
    assert not (GOLDEN / "models" / "start" / "chat_template.jinja").exists()


def test_auto_takes_the_most_common_chat_template(tmp_path):
    folders, sources = {}, {}
    for name, text in (("a", "one"), ("b", "two"), ("c", "two\n"), ("d", None)):
        folders[name] = shutil.copytree(GOLDEN / "models" / "math", tmp_path / name)
        sources[name] = open_checkpoint(folders[name], name)
        if text:
            (folders[name] / "chat_template.jinja").write_text(text)
    auto = align(None, None, "auto", folders, sources, None, "a")
    assert read_chat_template(auto.tokenizer_folder) == "two"
    # the donor's own, so its files are copied as they are
    auto = align(None, None, "auto", folders, sources, None, "c")
    assert auto.tokenizer_folder == folders["c"]
    none = {"d": folders["d"]}
    assert align(None, None, "auto", none, sources, None, "d").tokenizer_folder == folders["d"]


def test_a_chat_template_without_a_tokenizer(tmp_path):
    _, sources = open_models("math")
    with pytest.raises(MergeError, match=r"has no tokenizer that it could go with"):
        align(None, None, "chatml", {"math": tmp_path}, sources, None, "math")


@pytest.mark.parametrize("tied", [True, False])
def test_a_live_model_takes_the_merge_of_another_size(tied):
    recipe = read_recipe(GOLDEN / "recipes" / "union_base.yaml")
    vocabulary = vocabulary_of(recipe)
    if tied:
        headless = {name: without_head(source) for name, source in vocabulary.sources.items()}
        vocabulary = replace(vocabulary, sources=headless)
    sources = vocabulary.sources
    plan = make_plan(recipe, sources, layout_of(sources["start"].names()))
    model = LlamaForCausalLM(
        LlamaConfig.from_pretrained(GOLDEN / "models" / "start", tie_word_embeddings=tied)
    ).requires_grad_(False)
    fit_vocabulary(model, vocabulary)
    digest = write_live(plan, sources, StatisticsCache(), model)
    merged = merged_tensors(plan, sources, StatisticsCache())
    assert digest == digest_of(MemorySource(merged))
    assert torch.equal(model.get_input_embeddings().weight, merged[EMBEDDING])
    assert torch.equal(model.lm_head.weight, merged[EMBEDDING if tied else HEAD])
    assert not any(weight.requires_grad for weight in model.parameters())
    logits = model(torch.tensor([[len(merged[EMBEDDING]) - 1]])).logits
    assert logits.shape[-1] == len(merged[EMBEDDING])
    embedding = model.get_input_embeddings()
    fit_vocabulary(model, vocabulary)
    assert model.get_input_embeddings() is embedding


def without_head(source):
    tensors = {name: source.read(name) for name in source.names() if name != HEAD}
    return MemorySource(tensors, source.label, {HEAD: EMBEDDING})
