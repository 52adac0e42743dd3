"""Sidecars of a merge: which config, tokenizer, templates and code are copied, and from whom."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.checkpoints.depth import with_depth
from evomerge.checkpoints.index import read_json
from evomerge.config.models import DtypeName
from evomerge.errors import CheckpointError

VOCABULARY_FILES = (
    "tokenizer.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.model",  # sentencepiece: tokenizer.model, spiece.model, sentencepiece.bpe.model
    "*.tiktoken",
)
"""Files that hold a tokenizer's vocabulary, as glob patterns."""

_TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
CONFIG_FILES = ("config.json", "generation_config.json")
"""Files that, besides weights and tokenizer, decide what a model answers."""

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Sidecars:
    """What was copied from whom; goes into the provenance beside the weights.

    Attributes:
        donor: Folder of the model that gave `config_files`.
        config_files: Names of config.json and what goes with it, sorted.
        tokenizer_donor: Folder of the model that gave `tokenizer_files`.
        tokenizer_files: Names of tokenizer files and chat templates, sorted; empty where the model
            has none.
    """

    donor: Path
    config_files: tuple[str, ...]
    tokenizer_donor: Path
    tokenizer_files: tuple[str, ...]


def copy_sidecars(
    donor: Path,
    tokenizer_donor: Path,
    out: Path,
    *,
    dtype: DtypeName | None,
    vocab_size: int | None = None,
    numbered_by: Path | None = None,
    layers: Sequence[int] | None = None,
) -> Sidecars:
    """Copy everything that is not a tensor into a new checkpoint.

    From the donor: config.json with the new dtype, generation_config.json, processor settings, and
    the modelling code (every *.py) if the config refers to it. From the tokenizer's donor:
    vocabulary, tokenizer settings, chat templates, and its code if it refers to some. Anything
    else, such as a README, stays behind.

    Args:
        donor: Folder of the model whose architecture the merge has.
        tokenizer_donor: Folder of the model whose tokenizer the merge takes; may be the donor.
        out: Folder of the new checkpoint; exists.
        dtype: Dtype of the merged tensors; None leaves that of config.json as it is.
        vocab_size: Rows of the token embedding; None leaves that of config.json as it is.
        numbered_by: Folder of the model whose token numbers the merge has: its bos, eos and other
            token ids take the place of the donor's; None leaves these as they are.
        layers: For each layer of the merge, the donor's layer that describes it; None leaves the
            donor's layers as they are.

    Returns:
        What was copied from whom.

    Raises:
        CheckpointError: The donor has no readable config.json, or the two bring different code
            under one name.
        MergeError: config.json cannot describe the stacked layers.
    """
    config = merged_config(donor, dtype=dtype, vocab_size=vocab_size, layers=layers)
    write_json(out / "config.json", config)
    patterns = ["generation_config.json", *_PROCESSOR_FILES, *_code(config)]
    config_files = ["config.json", *_copy(donor, out, patterns)]
    if numbered_by is not None:
        for name in CONFIG_FILES:
            _renumber(out / name, numbered_by / name)
    tokenizer_files = copy_tokenizer(tokenizer_donor, out)
    return Sidecars(
        donor, tuple(sorted(config_files)), tokenizer_donor, tuple(sorted(tokenizer_files))
    )


def merged_config(
    donor: Path,
    *,
    dtype: DtypeName | None = None,
    vocab_size: int | None = None,
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return the donor's config.json with what a merge changes; arguments as `copy_sidecars`.

    Raises:
        CheckpointError: The donor has no readable config.json.
        MergeError: config.json cannot describe the stacked layers.
    """
    config = read_json(donor / "config.json", str(donor))
    config = config if dtype is None else _with_dtype(config, dtype)
    config = config if vocab_size is None else _with_vocab_size(config, vocab_size)
    return config if layers is None else with_depth(config, layers)


def sidecars_hash(folder: Path) -> str:
    """Return a hash of the files besides weights that decide what a model answers, as hexadecimal.

    Its config files and those of its tokenizer, chat templates included.
    """
    digest = hashlib.sha256()
    for pattern in (*CONFIG_FILES, *_TOKENIZER_FILES):
        for path in sorted(folder.glob(pattern)):
            digest.update(json.dumps(str(path.relative_to(folder))).encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def copy_tokenizer(donor: Path, out: Path) -> list[str]:
    """Copy vocabulary, tokenizer settings, chat templates, and code if the settings refer to some.

    Returns:
        Names of the files.

    Raises:
        CheckpointError: Its settings cannot be read, or `out` has other code under one name.
    """
    settings = donor / "tokenizer_config.json"
    config = read_json(settings, str(donor)) if settings.exists() else {}
    return _copy(donor, out, [*_TOKENIZER_FILES, *_code(config)])


def _with_vocab_size(config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return the config with its language model's vocab_size replaced."""
    text = config.get("text_config")
    changed = dict(config)
    if isinstance(text, dict):
        changed["text_config"] = {**text, "vocab_size": vocab_size}
    if "vocab_size" in config or not isinstance(text, dict):
        changed["vocab_size"] = vocab_size
    return changed


def configs_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what a model's config files say, by their names."""
    paths = [folder / name for name in CONFIG_FILES]
    return {path.name: read_json(path, str(folder)) for path in paths if path.exists()}


def token_ids(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special-token ids of another config that take the place of those in a config."""
    return {key: other[key] for key in config if key.endswith("_token_id") and key in other}


def _renumber(path: Path, theirs: Path) -> None:
    """Give a config the token ids of another one, where both have them."""
    if not path.exists() or not theirs.exists():
        return
    config, other = read_json(path, str(path.parent)), read_json(theirs, str(theirs.parent))
    write_json(path, {**config, **token_ids(config, other)})


def _code(config: dict[str, Any]) -> list[str]:
    return ["*.py"] if "auto_map" in config else []


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return the config with its dtype, and that of nested configs that have one, replaced."""
    keys = [key for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)]
    changed = {**config, **dict.fromkeys(keys or ["dtype"], dtype)}
    for key, part in config.items():
        if (
            key.endswith("_config")
            and isinstance(part, dict)
            and part.keys() & {"dtype", "torch_dtype"}
        ):
            changed[key] = _with_dtype(part, dtype)
    return changed


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a config as transformers does: indented, letters of any script as they are."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(source: Path, out: Path, patterns: list[str]) -> list[str]:
    paths = [path for pattern in patterns for path in source.glob(pattern) if path.is_file()]
    for path in paths:
        target = out / path.relative_to(source)
        # of what both donors bring, only code may differ
        clash = path.suffix == ".py" and target.exists()
        if clash and target.read_bytes() != path.read_bytes():
            raise CheckpointError(
                f"{source}: its {path.name} differs from the one that the config's model brings. "
                "Take the tokenizer of the base model."
            )
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    return [str(path.relative_to(source)) for path in paths]
