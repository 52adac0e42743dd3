"""The vocabulary of a tokenizer folder, and tokenizers with fewer or more tokens than another has.

A tokenizer is edited as the JSON of Hugging Face's tokenizers library, so its normalizer, its
pre-tokenizer, and the numbers of the tokens that stay are those it had
(https://huggingface.co/docs/tokenizers/api/models).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.checkpoints.index import read_json
from evomerge.checkpoints.sidecars import VOCABULARY_FILES, copy_tokenizer, write_json
from evomerge.errors import CheckpointError, MergeError

_EDITABLE = ("BPE", "Unigram", "WordLevel", "WordPiece")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# below any piece of the vocabulary: an added token is found before the pieces are looked at
_UNUSED_SCORE = -1e4


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model's folder.

    Raises:
        CheckpointError: There is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder}: transformers cannot load this tokenizer ({reason})."
        ) from None


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds a vocabulary."""
    return any(any(folder.glob(pattern)) for pattern in VOCABULARY_FILES)


def stored_numbers(folder: Path) -> dict[str, int]:
    """Return token → number as tokenizer.json says; empty where there is no such file.

    Quicker than `Tokens`, but without what transformers adds to the file's tokens.

    Raises:
        CheckpointError: The file cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return {}
    stored = read_json(path, str(folder))
    pieces = stored.get("model", {}).get("vocab", {})
    if isinstance(pieces, list):  # a unigram model lists [piece, log probability]
        pieces = {piece: number for number, (piece, _) in enumerate(pieces)}
    return {**pieces, **{token["content"]: token["id"] for token in stored.get("added_tokens", [])}}


@dataclass(frozen=True)
class Tokens:
    """The tokens of one model that have a row in its embedding.

    Attributes:
        label: How messages name the model.
        folder: Its folder.
        num_rows: Rows of its embedding; a token with a larger number is left out. None has no
            limit.
    """

    label: str
    folder: Path
    num_rows: int | None = None

    @cached_property
    def all_numbers(self) -> dict[str, int]:
        """Token → number as transformers has them, with or without a row, in order of number."""
        found: dict[str, int] = self._loaded.get_vocab()
        return dict(sorted(found.items(), key=lambda item: item[1]))

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Token → number of those with a row, in order of number."""
        if self.num_rows is None:
            return self.all_numbers
        return {token: row for token, row in self.all_numbers.items() if row < self.num_rows}

    @cached_property
    def _loaded(self) -> Any:
        return load_tokenizer(self.folder)

    @cached_property
    def stored(self) -> dict[str, Any]:
        """The tokenizer as the tokenizers library writes it.

        Raises:
            MergeError: It has no tokenizer.json, or is of a kind that cannot be edited.
        """
        backend = getattr(self._loaded, "backend_tokenizer", None)
        if backend is None or not (self.folder / "tokenizer.json").exists():
            raise MergeError(
                f"tokenizer: {self.label} has no tokenizer.json, which a new vocabulary is made "
                "from. Convert its tokenizer, or use source: base without new tokens."
            )
        stored: dict[str, Any] = json.loads(backend.to_str())
        kind = stored["model"].get("type")
        if kind not in _EDITABLE:
            raise MergeError(
                f"tokenizer: {self.label} has a vocabulary of the kind {kind}, and only "
                f"{', '.join(_EDITABLE)} can be changed. Use source: base without new tokens."
            )
        return stored


def join_numbers(first: Tokens, others: Sequence[Tokens], new: Iterable[str]) -> dict[str, int]:
    """Return token → number of the union: the first keeps its numbers, what is new comes after.

    Args:
        first: The model whose numbers stay.
        others: Their tokens follow, model by model, in the order of their numbers there.
        new: Tokens that follow these.
    """
    numbers = dict(first.numbers)
    end = max(numbers.values(), default=-1) + 1
    for tokens in (*(other.numbers for other in others), new):
        for token in tokens:
            if token not in numbers:
                numbers[token] = end
                end += 1
    return numbers


def write_joined(
    first: Tokens, others: Sequence[Tokens], numbers: dict[str, int], out: Path
) -> None:
    """Write the first's tokenizer with another vocabulary, and check it by loading it.

    A text is split as the first does it. Merges of the others follow those of the first, tokens
    that others have added are added with their own settings, and those that nobody has are added
    as plain text.

    Args:
        first: The tokenizer that is changed.
        others: Where its new tokens are from.
        numbers: Token → number of the result; of the first's tokens all keep theirs or are missing.
        out: An empty folder.

    Raises:
        CheckpointError: transformers does not read the result as it was meant.
        MergeError: The tokenizers are not of one kind that can be edited.
    """
    every = (first, *others)
    for other in others:
        kind, others_kind = first.stored["model"]["type"], other.stored["model"]["type"]
        if kind != others_kind:
            raise MergeError(
                f"tokenizer: {first.label} has a vocabulary of the kind {kind}, {other.label} of "
                f"the kind {others_kind}, and a union takes one kind. Use source: base."
            )
    added = _added_tokens([tokens.stored for tokens in every], numbers)
    model = _model([tokens.stored["model"] for tokens in every], numbers, first.label)
    copy_tokenizer(first.folder, out)
    for pattern in VOCABULARY_FILES:
        for path in out.glob(pattern):
            path.unlink()
    write_json(out / "tokenizer.json", {**first.stored, "added_tokens": added, "model": model})
    _list_added(out / "tokenizer_config.json", added)
    read = load_tokenizer(out).get_vocab()
    wrong = [token for token, number in numbers.items() if read.get(token) != number]
    if wrong:
        raise CheckpointError(
            f"{first.folder}: transformers gives {len(wrong)} tokens of a changed vocabulary other "
            f"numbers than it says, first {wrong[0]!r}. Use tokenizer: {{source: base}}."
        )


def _added_tokens(
    stored: Sequence[dict[str, Any]], numbers: dict[str, int]
) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for one in stored:
        for token in one.get("added_tokens", []):
            found.setdefault(token["content"], token)
    known = {piece for one in stored for piece in _pieces(one["model"])}
    for token in numbers:
        if token not in known and token not in found:
            found[token] = {"content": token, **dict.fromkeys(_FLAGS, False), "normalized": True}
    entries = [{**token, "id": numbers[name]} for name, token in found.items() if name in numbers]
    return sorted(entries, key=lambda entry: entry["id"])


def _pieces(model: dict[str, Any]) -> Iterable[str]:
    vocabulary = model["vocab"]
    return (piece for piece, _ in vocabulary) if isinstance(vocabulary, list) else vocabulary


def _model(models: Sequence[dict[str, Any]], numbers: dict[str, int], label: str) -> dict[str, Any]:
    """Return the first model with all tokens as pieces.

    Added tokens are among them because the library gives added tokens that are no pieces the
    numbers after the last piece.
    """
    kind = models[0]["type"]
    if kind == "Unigram":
        return {**models[0], "vocab": _scored(models, numbers, label)}
    if kind == "BPE":
        return {**models[0], "vocab": numbers, "merges": _merges(models, numbers)}
    return {**models[0], "vocab": numbers}


def _merges(models: Sequence[dict[str, Any]], numbers: dict[str, int]) -> list[list[str]]:
    start = len(models[0].get("continuing_subword_prefix") or "")
    pairs = dict.fromkeys(
        tuple(pair.split(" ", 1) if isinstance(pair, str) else pair)
        for model in models
        for pair in model["merges"]
    )
    return [
        [left, right]
        for left, right in pairs
        if left in numbers and right in numbers and left + right[start:] in numbers
    ]


def _scored(
    models: Sequence[dict[str, Any]], numbers: dict[str, int], label: str
) -> list[list[Any]]:
    ordered = sorted(numbers, key=numbers.__getitem__)
    if numbers[ordered[-1]] != len(ordered) - 1:
        raise MergeError(
            f"tokenizer: {label} has a Unigram vocabulary with unused numbers, to which nothing "
            "can be added. Use source: base without new tokens."
        )
    scores: dict[str, float] = {}
    for model in models:
        for piece, score in model["vocab"]:
            scores.setdefault(piece, score)
    return [[token, scores.get(token, _UNUSED_SCORE)] for token in ordered]


def _list_added(path: Path, added: Sequence[dict[str, Any]]) -> None:
    """Bring the list of added tokens that transformers 4 wrote into its settings up to date."""
    config = read_json(path, str(path.parent)) if path.exists() else {}
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {
            str(entry["id"]): {name: entry[name] for name in ("content", *_FLAGS)}
            for entry in added
        }
        write_json(path, config)
