"""RecipeFile: what stands in a mergekit file, checked; `mergekit.py` makes a recipe of it."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

from evomerge.config.models import DtypeName, ModelRef
from evomerge.config.recipe import (
    LayerRange,
    Rounding,
    Setting,
    Slice,
    SliceSource,
    Source,
    ThresholdTies,
    of_one_depth,
)
from evomerge.config.strict import StrictModel
from evomerge.config.tokenizer import TokenizerConfig
from evomerge.registry import did_you_mean

_RULE = ("filter", "value")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_SETTING: TypeAdapter[Setting] = TypeAdapter(
    Setting, config=ConfigDict(strict=True, allow_inf_nan=False)
)


def _setting(value: Any) -> Setting:
    rules = [value] if isinstance(value, dict) else value
    if isinstance(rules, list):
        _check_rules([rule for rule in rules if isinstance(rule, dict)])
    setting: Setting = ()
    with suppress(ValidationError):
        setting = _SETTING.validate_json(json.dumps(_with_numbers(rules)))
    if setting == ():
        raise ValueError(
            f"came {value!r}; a number, true or false, a list of numbers (a layer curve), or a "
            "list of rules {filter, value} is needed."
        )
    return setting


def _check_rules(rules: list[dict[str, Any]]) -> None:
    for key in (key for rule in rules for key in rule if key not in _RULE):
        raise ValueError(f"{key!r} is no key of a rule.{did_you_mean(str(key), _RULE)}")


def _with_numbers(value: Any) -> Any:
    """Return a setting with the texts in it that are numbers (plain YAML reads 1e-5 so) as such."""
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_numbers(v) if key == "value" else v for key, v in value.items()}
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _none_is_empty(value: Any) -> Any:
    # `parameters:` with nothing after it
    return {} if value is None else value


def _as_text(value: Any) -> Any:
    return str(ModelRef.model_validate(value)) if isinstance(value, dict) else value


_Parameters = Annotated[
    dict[str, Annotated[Setting, PlainValidator(_setting)]], BeforeValidator(_none_is_empty)
]


def placed(reference: ModelRef, folder: Path | None) -> ModelRef:
    """Return a reference with relative paths read from a folder; None leaves it as it is."""
    return reference if folder is None else reference.relative_to(folder)


class SourceFile(StrictModel):
    """A model of a file."""

    model: ModelRef
    parameters: _Parameters = Field(default_factory=dict)

    def source(self, folder: Path | None) -> Source:
        """Return it with relative paths read from a folder."""
        return Source(model=placed(self.model, folder), parameters=self.parameters)


class SliceSourceFile(StrictModel):
    """Layers of a model of a file."""

    model: ModelRef
    layer_range: LayerRange
    parameters: _Parameters = Field(default_factory=dict)

    def source(self, folder: Path | None) -> SliceSource:
        """Return it with relative paths read from a folder."""
        return SliceSource(
            model=placed(self.model, folder),
            layer_range=self.layer_range,
            parameters=self.parameters,
        )


class SliceFile(StrictModel):
    """A slice of a file."""

    sources: Annotated[tuple[SliceSourceFile, ...], AfterValidator(of_one_depth)]
    base_model: ModelRef | None = None
    parameters: _Parameters = Field(default_factory=dict)

    def slice(self, folder: Path | None) -> Slice:
        """Return it with relative paths read from a folder."""
        return Slice(
            sources=tuple(source.source(folder) for source in self.sources),
            base_model=self.base_model and placed(self.base_model, folder),
            parameters=self.parameters,
        )


class ModuleFile(StrictModel):
    """A module of a file: one of models and slices."""

    models: tuple[SourceFile, ...] = ()
    slices: tuple[SliceFile, ...] = ()
    parameters: _Parameters = Field(default_factory=dict)


class _Extras(StrictModel):
    mask_seed: int = Field(0, ge=0, lt=2**32)
    mask: str | None = None
    threshold_ties: ThresholdTies = "keep"
    rounding: Rounding = "nearest"


class RecipeFile(ModuleFile):
    """A mergekit file; what is in its module, if it has one, stands beside the rest."""

    merge_method: str
    modules: dict[str, ModuleFile] = Field(default_factory=dict)
    base_model: ModelRef | None = None
    dtype: DtypeName | None = None
    out_dtype: DtypeName | None = None
    tokenizer_source: Annotated[str | None, BeforeValidator(_as_text)] = None
    tokenizer: TokenizerConfig | None = None
    chat_template: str | None = None
    evomerge: _Extras = _Extras()
