"""align: models with different vocabularies brought to one, row by row, as a recipe says.

A model's own row stays. Where a model lacks a token, its row is the base's; where the base lacks it
too, that of the only model that has it, or the mean of those that have it; zeros where none has it.
`tokens` of the recipe's tokenizer section come before these rules, and with `force` before a
model's own row (mergekit 0.1.5's rules, docs/tokenizer.md).

Deviations from mergekit: where the models number their tokens alike and have equally many rows,
nothing is changed, and rows beyond the last token stay. A union's new tokens come in the same order
in every run, and as pieces and merges, so that they are found in text as their model finds them.
The numbers of special tokens in config.json follow the tokenizer. Every model that the recipe names
counts when a row is filled, in each of its slices.
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evomerge.checkpoints.aligned import MEAN, PADDING, ZERO, AlignedSource, Rows
from evomerge.checkpoints.architecture import embedding_and_head
from evomerge.checkpoints.chat_templates import (
    chat_template_of,
    most_common_template,
    read_chat_template,
    write_chat_template,
)
from evomerge.checkpoints.locate import locate
from evomerge.checkpoints.sidecars import copy_tokenizer
from evomerge.checkpoints.source import TensorSource
from evomerge.checkpoints.vocabulary import (
    Tokens,
    has_tokenizer,
    join_numbers,
    stored_numbers,
    write_joined,
)
from evomerge.config.models import ModelRef
from evomerge.config.tokenizer import ModelToken, TokenConfig, TokenizerConfig, ZeroRow
from evomerge.errors import MergeError


@dataclass(frozen=True)
class Vocabulary:
    """The models of a merge over one vocabulary.

    Attributes:
        size: Rows of the token embedding; None where the models' own stays.
        sources: The models' tensors, in the order and under the names they came in.
        tokenizer_folder: Folder with the tokenizer files and the chat template of the merge: a
            model's own, or a temporary one.
        numbered_by: Folder of the model whose token numbers the merge has; None is the donor.
        digest: Of where each row is from, which the merge's bits depend on; empty where nothing
            was changed.
        temporary: Keeps the temporary folder for as long as this object lives.
    """

    size: int | None
    sources: Mapping[str, TensorSource]
    tokenizer_folder: Path
    numbered_by: Path | None = None
    digest: str = ""
    temporary: "tempfile.TemporaryDirectory[str] | None" = None

    @property
    def num_rows(self) -> int | None:
        """Rows of the token embedding, changed or not; None where none is known by its name."""
        source = next(iter(self.sources.values()))
        name, _ = embedding_and_head(source.names())
        return None if name is None else source.shape(name)[0]


@dataclass(frozen=True)
class _Models:
    """Models that are merged, the base first if there is one, and where their tokens are.

    Attributes:
        folders: Folder of each.
        sources: Tensors of each.
        base: The base model, or None.
        donor: The model that gives config and tokenizer unless told otherwise.
    """

    folders: Mapping[str, Path]
    sources: Mapping[str, TensorSource]
    base: str | None
    donor: str

    @property
    def embedding(self) -> str | None:
        """Name of the donor's token embedding."""
        return embedding_and_head(self.sources[self.donor].names())[0]

    def num_rows(self, model: str) -> int | None:
        """Rows of a model's token embedding."""
        name, source = self.embedding, self.sources[model]
        return source.shape(name)[0] if name is not None and name in source else None


def align(
    tokenizer: TokenizerConfig | None,
    tokenizer_source: str | None,
    chat_template: str | None,
    folders: Mapping[str, Path],
    sources: Mapping[str, TensorSource],
    base: str | None,
    donor: str,
) -> Vocabulary:
    """Bring models to one vocabulary, and make the tokenizer that goes with it.

    No tensor is read before its rows are asked for.

    Args:
        tokenizer: The recipe's tokenizer section; None where it has none.
        tokenizer_source: The section's `source` alone; None where the recipe does not say.
        chat_template: `auto`, a built-in template's name, or Jinja; None keeps the tokenizer's.
        folders: Folder of each model by its reference, in the recipe's order, the base first.
        sources: Tensors of each model by its reference.
        base: Reference of the base model; None where the recipe has none.
        donor: Reference of the model that gives config and tokenizer unless told otherwise.

    Raises:
        CheckpointError: A tokenizer cannot be read, or a new one would not be read as meant.
        MergeError: The vocabularies differ and the recipe does not say what to do, its tokenizer
            section names a token or model that is not there, a tokenizer is of a kind that cannot
            be changed, or the chat template is not valid.
    """
    models = _Models(folders, sources, base, donor)
    template = _template(chat_template, folders.values())
    if tokenizer is None and tokenizer_source is not None:
        tokenizer = TokenizerConfig(source=tokenizer_source)
    if tokenizer is None:
        _check_alike(models)
        vocabulary = Vocabulary(None, sources, folders[donor])
    else:
        vocabulary = _aligned(tokenizer, models)
    return vocabulary if template is None else _with_template(vocabulary, template)


def fit_vocabulary(model: Any, vocabulary: Vocabulary) -> None:
    """Give a live model as many token rows as a merge has, to be overwritten.

    Args:
        model: A transformers model; its token embedding and head are replaced if they have another
            size.
        vocabulary: The vocabulary of the merge.
    """
    rows = vocabulary.num_rows
    if rows is not None and model.get_input_embeddings().weight.shape[0] != rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.requires_grad_(False)


def _check_alike(models: _Models) -> None:
    """Refuse vocabularies that differ, as far as shapes and tokenizer.json tell."""
    if _same_files(models.folders[models.donor], models):
        return
    who = f"base {models.donor}" if models.base else models.donor
    rows, numbers = models.num_rows(models.donor), stored_numbers(models.folders[models.donor])
    advice = (
        "To merge row by row of the same token, add tokenizer_source: base (in a search, "
        "merge.tokenizer: base), or tokenizer: {source: union}."
    )
    for model in models.folders:
        others_rows = models.num_rows(model)
        if None not in (rows, others_rows) and rows != others_rows:
            raise MergeError(
                f"{models.embedding}: {model} has {others_rows} rows, {who} has {rows}, so their "
                f"vocabularies differ. {advice}"
            )
        others = {} if model == models.donor else stored_numbers(models.folders[model])
        moved = [token for token, row in others.items() if numbers.get(token, row) != row]
        if moved:
            raise MergeError(
                f"{models.embedding}: {model} has {len(others)} tokens, {who} has {len(numbers)}, "
                f"and {len(moved)} have different numbers, first {moved[0]!r}. {advice}"
            )


def _aligned(config: TokenizerConfig, models: _Models) -> Vocabulary:
    chosen, folder = _chosen_tokenizer(config, models)
    plain = not config.tokens and config.pad_to_multiple_of is None
    if plain and _same_files(folder, models):
        return Vocabulary(None, models.sources, folder)
    tokens = {
        # a model without a tokenizer is taken to have the numbers of the chosen one
        model: Tokens(model, own if has_tokenizer(own) else folder, models.num_rows(model))
        for model, own in models.folders.items()
    }
    first = tokens.get(chosen) or Tokens(chosen, folder)
    others = [theirs for theirs in tokens.values() if theirs.folder != folder]
    others = others if config.source == "union" else []
    numbers = join_numbers(first, others, config.tokens)
    if plain and _agree(numbers, tokens, models, chosen):
        return Vocabulary(None, models.sources, folder)
    names, rows = _vocabulary_tensors(models), _rows(config, numbers, tokens, models)
    inner = [models.sources[model] for model in tokens]
    aligned = {model: AlignedSource(inner, i, rows, names) for i, model in enumerate(tokens)}
    numbered_by = None if folder == models.folders[models.donor] else folder
    vocabulary = Vocabulary(rows.num_rows, aligned, folder, numbered_by, rows.digest(tokens))
    if numbers == first.all_numbers:
        return vocabulary
    temporary = tempfile.TemporaryDirectory(prefix="evomerge-tokenizer-")
    write_joined(first, others, numbers, Path(temporary.name))
    return replace(vocabulary, tokenizer_folder=Path(temporary.name), temporary=temporary)


def _vocabulary_tensors(models: _Models) -> list[str]:
    source = models.sources[models.donor]
    embedding, head = embedding_and_head(source.names())
    if embedding is None:
        raise MergeError(
            f"tokenizer: {models.donor} has no tensor that is known as its token embedding, so its "
            "rows cannot be moved. Remove tokenizer and tokenizer_source."
        )
    bias = head.removesuffix("weight") + "bias" if head else ""
    return [name for name in (embedding, head, bias) if name and name in source]


def _chosen_tokenizer(config: TokenizerConfig, models: _Models) -> tuple[str, Path]:
    """Return the model whose numbers count, and the folder of its tokenizer."""
    if config.source in ("union", "base"):
        chosen = models.donor
    else:
        chosen = str(ModelRef.model_validate(config.source))
    folder = models.folders.get(chosen) or locate(ModelRef.model_validate(chosen))
    if not has_tokenizer(folder):
        raise MergeError(
            f"tokenizer: source {config.source} is the tokenizer of {chosen}, and {folder} has "
            "none. Name another model."
        )
    return chosen, folder


def _same_files(first: Path, models: _Models) -> bool:
    """Whether all models have this folder's tokenizer.json, and equally many rows.

    Most fine-tunes do, and then no tokenizer needs to be loaded.
    """
    paths = [folder / "tokenizer.json" for folder in (first, *models.folders.values())]
    return (
        _one_size(models)
        and all(path.exists() for path in paths)
        and len({path.read_bytes() for path in paths}) == 1
    )


def _one_size(models: _Models) -> bool:
    return len({models.num_rows(model) for model in models.folders}) == 1


def _agree(
    numbers: Mapping[str, int], tokens: Mapping[str, Tokens], models: _Models, chosen: str
) -> bool:
    """Whether every model has every token under its number, and all have equally many rows.

    Where the model of these numbers is not merged, there is nothing to fill a row with: a model may
    then lack a token, as long as it has no other under that number and a row for it.
    """
    if not _one_size(models):
        return False
    if chosen in tokens:
        return all(numbers.items() <= theirs.numbers.items() for theirs in tokens.values())
    num_rows = models.num_rows(models.donor)
    fits = num_rows is None or max(numbers.values()) < num_rows
    return fits and all(_no_other(numbers, theirs.numbers) for theirs in tokens.values())


def _no_other(numbers: Mapping[str, int], own: Mapping[str, int]) -> bool:
    """Whether no number means one token here and another in a model."""
    names = {number: token for token, number in numbers.items()}
    return all(
        numbers.get(token, number) == number and names.get(number, token) == token
        for token, number in own.items()
    )


def _rows(
    config: TokenizerConfig,
    numbers: Mapping[str, int],
    tokens: Mapping[str, Tokens],
    models: _Models,
) -> Rows:
    used = torch.tensor(list(numbers.values()))
    multiple = config.pad_to_multiple_of or 1
    num_rows = -(-(int(used.max()) + 1) // multiple) * multiple
    own_MR = torch.full((len(tokens), num_rows), -1)
    for index, theirs in enumerate(tokens.values()):
        own_MR[index, used] = torch.tensor([theirs.numbers.get(token, -1) for token in numbers])
    order = list(tokens)
    fill_R = _default_fills(own_MR, order.index(models.base) if models.base else None)
    is_token_R = torch.zeros(num_rows, dtype=torch.bool)
    is_token_R[used] = True
    fill_R[~is_token_R] = PADDING
    row_R = own_MR.gather(0, fill_R.clamp(min=0)[None])[0]
    for token, setting in config.tokens.items():
        row = numbers[token]
        if setting.source is not None:
            fill_R[row], row_R[row] = _chosen(token, setting, tokens, models)
        if setting.force:
            own_MR[:, row] = -1
    return Rows(own_MR, fill_R, row_R)


def _default_fills(own_MR: torch.Tensor, base: int | None) -> torch.Tensor:
    """Return what a row is filled with in the models that lack its token."""
    has_MR = own_MR >= 0
    count_R = has_MR.sum(0)
    fill_R = torch.full_like(own_MR[0], MEAN)
    if base is not None:
        fill_R[has_MR[base]] = base
    only_R = count_R == 1
    fill_R[only_R] = has_MR.int().argmax(0)[only_R]
    fill_R[count_R == 0] = ZERO
    return fill_R


def _chosen(
    token: str, setting: TokenConfig, tokens: Mapping[str, Tokens], models: _Models
) -> tuple[int, int]:
    """Return the model's index and the row that a token's setting names; ZERO and 0 for zeros."""
    source = setting.source
    if source is None or isinstance(source, ZeroRow):
        return ZERO, 0
    where = f"tokenizer: tokens: {token!r}"
    model = str(source.model if isinstance(source, ModelToken) else source)
    if model not in tokens:
        raise MergeError(
            f"{where}: its source {model} is not merged here. Name one of {', '.join(tokens)}."
        )
    index = list(tokens).index(model)
    if isinstance(source, ModelToken) and source.token_id is not None:
        num_rows = models.num_rows(model)
        if num_rows is not None and source.token_id >= num_rows:
            raise MergeError(
                f"{where}: token_id {source.token_id} came, and {model} has rows 0 to "
                f"{num_rows - 1}."
            )
        return index, source.token_id
    name = token if not isinstance(source, ModelToken) else str(source.token)
    if name not in tokens[model].numbers:
        raise MergeError(
            f"{where}: its source {model} has no token {name!r}. Name a model that has it, or "
            "{kind: model_token, model: ..., token: ...} with a token that it has."
        )
    return index, tokens[model].numbers[name]


def _template(setting: str | None, folders: Iterable[Path]) -> str | None:
    if setting is None:
        return None
    return most_common_template(folders) if setting == "auto" else chat_template_of(setting)


def _with_template(vocabulary: Vocabulary, template: str) -> Vocabulary:
    folder, temporary = vocabulary.tokenizer_folder, vocabulary.temporary
    if not has_tokenizer(folder):
        raise MergeError(
            f"chat_template: {folder} has no tokenizer that it could go with. Remove chat_template."
        )
    if (read_chat_template(folder) or "").strip() == template.strip():
        return vocabulary
    if temporary is None:
        temporary = tempfile.TemporaryDirectory(prefix="evomerge-tokenizer-")
        copy_tokenizer(folder, Path(temporary.name))
    write_chat_template(Path(temporary.name), template)
    return replace(vocabulary, tokenizer_folder=Path(temporary.name), temporary=temporary)
