"""Sidecars of a merge: which config, tokenizer, templates and code are copied, and from whom."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.checkpoints.index import read_json
from evomerge.config.models import DtypeName
from evomerge.errors import CheckpointError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.model",  # sentencepiece: tokenizer.model, spiece.model, sentencepiece.bpe.model
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
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
    donor: Path, tokenizer_donor: Path, out: Path, *, dtype: DtypeName | None
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
        dtype: Dtype of the merged tensors; None leaves config.json as it is.

    Returns:
        What was copied from whom.

    Raises:
        CheckpointError: The donor has no readable config.json, or the two bring different code
            under one name.
    """
    config = read_json(donor / "config.json", str(donor))
    _write_json(out / "config.json", _with_dtype(config, dtype) if dtype else config)
    patterns = ["generation_config.json", *_PROCESSOR_FILES, *_code(config)]
    config_files = ["config.json", *_copy(donor, out, patterns)]
    settings = tokenizer_donor / "tokenizer_config.json"
    tokenizer_config = read_json(settings, str(tokenizer_donor)) if settings.exists() else {}
    tokenizer_files = _copy(tokenizer_donor, out, [*_TOKENIZER_FILES, *_code(tokenizer_config)])
    return Sidecars(
        donor, tuple(sorted(config_files)), tokenizer_donor, tuple(sorted(tokenizer_files))
    )


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


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(source: Path, out: Path, patterns: list[str]) -> list[str]:
    paths = [path for pattern in patterns for path in source.glob(pattern) if path.is_file()]
    for path in paths:
        target = out / path.relative_to(source)
        if target.exists() and target.read_bytes() != path.read_bytes():
            raise CheckpointError(
                f"{source}: its {path.name} differs from the one that the config's model brings. "
                "Take the tokenizer of the base model."
            )
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    return [str(path.relative_to(source)) for path in paths]
