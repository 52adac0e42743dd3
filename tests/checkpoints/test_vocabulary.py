"""Vocabularies: what transformers makes of a tokenizer with fewer or more tokens."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evomerge.checkpoints.vocabulary import (
    Tokens,
    has_tokenizer,
    join_numbers,
    load_tokenizer,
    stored_numbers,
    write_joined,
)
from evomerge.errors import CheckpointError, MergeError

BASE = ["<unk>", *"abcdef", "ab", "abc"]
OTHER = ["<unk>", *"fedcbaxy", "de", "ab", "xy"]
MERGES = {"base": ["a b", "ab c"], "other": ["d e", "a b", "x y"]}


def backend(kind, pieces, merges):
    numbers = {piece: number for number, piece in enumerate(pieces)}
    if kind == "BPE":
        pairs = [tuple(merge.split(" ")) for merge in merges]
        return Tokenizer(models.BPE(numbers, pairs, unk_token="<unk>"))
    if kind == "Unigram":
        scored = [(piece, -float(10 - 2 * len(piece))) for piece in pieces]
        return Tokenizer(models.Unigram(scored, unk_id=0))
    kinds = {"WordLevel": models.WordLevel, "WordPiece": models.WordPiece}
    tokenizer = Tokenizer(kinds[kind](numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def make(folder, kind="BPE", pieces=BASE, merges=MERGES["base"], special=(), plain=()):
    tokenizer = backend(kind, pieces, merges)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, lstrip=True) for token in plain])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def make_other(folder, kind="BPE", **settings):
    return make(folder, kind, OTHER, MERGES["other"], **settings)


def joined(out, first, *others, new=()):
    out.mkdir()
    numbers = join_numbers(first, others, new)
    write_joined(first, others, numbers, out)
    return load_tokenizer(out)


@pytest.fixture
def pair(tmp_path):
    base = make(tmp_path / "base", special=["</s>"], plain=["<a>"])
    other = make_other(tmp_path / "other", special=["</s>", "<tool>"], plain=["<a>", "<b>"])
    return Tokens("base", base), Tokens("other", other)


def test_a_union_keeps_the_firsts_numbers_and_adds_the_others_in_their_order(tmp_path, pair):
    base, other = pair
    union = joined(tmp_path / "out", base, other, new=["<new>", "ab"])
    expected = [*BASE, "</s>", "<a>", "x", "y", "de", "xy", "<tool>", "<b>", "<new>"]
    assert union.get_vocab() == {token: number for number, token in enumerate(expected)}


def test_a_union_splits_text_by_the_merges_of_both(tmp_path, pair):
    base, other = pair
    union = joined(tmp_path / "out", base, other, new=["<new>"])
    assert union.tokenize("abcfab") == load_tokenizer(base.folder).tokenize("abcfab")
    assert union.tokenize("abcfab") == ["abc", "f", "ab"]
    assert union.tokenize("xydef") == ["xy", "de", "f"]
    assert union.tokenize("xy</s><tool>f<new>ab") == ["xy", "</s>", "<tool>", "f", "<new>", "ab"]


def test_added_tokens_keep_their_settings(tmp_path, pair):
    union = joined(tmp_path / "out", *pair, new=["<new>"])
    settings = {token.content: token for token in union.added_tokens_decoder.values()}
    assert [token for token, one in settings.items() if one.special] == ["<unk>", "</s>", "<tool>"]
    assert [token for token, one in settings.items() if one.lstrip] == ["<a>", "<b>"]
    assert not settings["<new>"].special
    assert settings["<new>"].normalized


@pytest.mark.parametrize("kind", ["Unigram", "WordLevel", "WordPiece"])
def test_every_kind_that_can_be_changed(tmp_path, kind):
    base = Tokens("base", make(tmp_path / "base", kind, special=["</s>"]))
    other = Tokens("other", make_other(tmp_path / "other", kind, special=["<tool>"]))
    union = joined(tmp_path / "out", base, other, new=["<new>"])
    expected = [*BASE, "</s>", "x", "y", "de", "xy", "<tool>", "<new>"]
    assert union.get_vocab() == {token: number for number, token in enumerate(expected)}
    split = union.tokenize("abc xy</s><new> <tool>de")
    assert [token for token in split if token != " "] == [
        "abc",
        "xy",
        "</s>",
        "<new>",
        "<tool>",
        "de",
    ]


def test_tokens_without_a_row_are_left_out_with_their_merges(tmp_path):
    folder = make(tmp_path / "base", special=["</s>"])
    tokens = Tokens("base", folder, num_rows=8)
    assert tokens.numbers == {token: number for number, token in enumerate(BASE[:8])}
    assert tokens.all_numbers == {token: number for number, token in enumerate([*BASE, "</s>"])}
    cut = joined(tmp_path / "out", tokens)
    assert cut.get_vocab() == tokens.numbers
    assert cut.tokenize("abcab") == ["ab", "c", "ab"]


def test_what_transformers_adds_counts(tmp_path):
    folder = make(tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<pad>"}))
    assert Tokens("base", folder).numbers["<pad>"] == len(BASE)
    assert "<pad>" not in stored_numbers(folder)


def test_stored_numbers_are_those_that_transformers_reads(tmp_path):
    for kind in ("BPE", "Unigram", "WordLevel"):
        folder = make(tmp_path / kind, kind, special=["</s>"], plain=["<a>"])
        assert stored_numbers(folder) == load_tokenizer(folder).get_vocab()
    assert stored_numbers(tmp_path) == {}
    assert has_tokenizer(folder)
    assert not has_tokenizer(tmp_path)


def test_files_of_the_old_vocabulary_stay_behind(tmp_path, pair):
    base, other = pair
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"):
        (base.folder / name).write_text(name)
    path = base.folder / "tokenizer_config.json"
    stale = {"added_tokens_decoder": {"9": {"content": "</s>", "special": True}}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **stale}))
    joined(tmp_path / "out", base, other)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    contents = {n: token["content"] for n, token in written["added_tokens_decoder"].items()}
    assert contents == {"0": "<unk>", "9": "</s>", "10": "<a>", "15": "<tool>", "16": "<b>"}


def test_kinds_that_do_not_go_together(tmp_path, pair):
    words = Tokens("words", make_other(tmp_path / "words", "WordLevel"))
    with pytest.raises(MergeError, match=r"base has .* kind BPE, words of the kind WordLevel"):
        joined(tmp_path / "out", pair[0], words)


def test_a_tokenizer_without_tokenizer_json_cannot_be_changed(tmp_path, pair):
    base, other = pair
    assert other.numbers
    (other.folder / "tokenizer.json").unlink()
    with pytest.raises(MergeError, match=r"tokenizer: other has no tokenizer\.json, which a new"):
        joined(tmp_path / "out", base, other)


def test_a_result_that_is_read_otherwise_is_refused(tmp_path, pair, monkeypatch):
    base, other = pair
    numbers = join_numbers(base, [other], [])
    assert base.stored["model"]["type"] == other.stored["model"]["type"]
    old = load_tokenizer(base.folder)
    monkeypatch.setattr("evomerge.checkpoints.vocabulary.load_tokenizer", lambda folder: old)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"gives 6 tokens .* first 'x'"):
        write_joined(base, [other], numbers, tmp_path / "out")


def test_an_unreadable_tokenizer_is_one_sentence(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"transformers cannot load this tokenizer"):
        load_tokenizer(tmp_path)
