"""Recipes as mergekit YAML, both ways: mergekit 0.1.5 reads what we write, and we what it reads.

Read and written: `models`, `base_model`, `merge_method`, `parameters` (numbers, switches, layer
curves, rules by tensor name), `dtype`, `out_dtype`, `tokenizer_source`; and a key `evomerge` that
mergekit ignores. Refused: `slices`, `modules`, `tokenizer`, `chat_template`, LoRA references.

Where evomerge does otherwise than mergekit 0.1.5, and why:

- Arithmetic is float32 whatever `dtype` says, and the result is rounded once. mergekit casts the
  inputs to `dtype` and, except in linear and slerp, computes in it, weights included: in bfloat16 a
  weight that changes by 0.001 changes nothing. To compare the two, set `dtype: float32`.
- Without `dtype` and `out_dtype` a tensor keeps the base's dtype (or the first model's); mergekit
  takes the widest of all models'. A parent in float32 should not double the size of a merge.
- DARE's random masks are drawn from counters, so that every machine draws the same; mergekit's come
  from one generator and depend on the order of all draws before. Same distribution, other masks.
- TIES keeps all elements that equal the smallest one kept, and compares magnitudes at the precision
  of the checkpoints; mergekit takes whichever of them its sort puts first.
- TIES adds the positive and the negative terms of an element apart and compares the two sums;
  mergekit takes the sign of the sum of all. They differ only where the sum is rounding error.
- linear with weights that add up to less than 1e-8 is an error; mergekit writes Inf and NaN.
- slerp takes the straight line where a tensor is zero; mergekit takes a right angle, which has no
  meaning there. The angle comes from float64 sums; mergekit's from float32.
- `t` and `density` outside [0, 1] are errors; mergekit extrapolates, or takes the nearer end.
- A list of true and false is an error; mergekit picks one by depth. Nothing needs it.
- linear adds the models as listed; mergekit adds the base, if listed, first. Last-bit differences.
- Unknown keys and parameters, a shared parameter under one model, parameters of the base where
  only task vectors have some, `density` or `rescale` for task_arithmetic: errors, because they
  would have no effect; mergekit ignores them.
- A tensor that only some models have is an error; mergekit skips what its table of architectures
  does not list, or treats as optional there.
- `tokenizer_source` copies files, and is an error where token numbers differ; mergekit then moves
  rows of the embeddings. `union` is refused.
- Without a base, config and tokenizer come from the first model; mergekit takes any one of them,
  and not always the same.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

from evomerge.config.models import DtypeName, ModelRef
from evomerge.config.recipe import Recipe, Setting, Source
from evomerge.config.strict import Origin, StrictModel, parse_yaml, read_yaml, validate
from evomerge.errors import ConfigError

MASK_VERSION = "philox4x32-7"
"""Names the random masks that a recipe's `mask_seed` stands for; changes whenever they would."""

RANDOM_METHODS = ("dare_linear", "dare_ties", "della", "della_linear")
"""mergekit's methods that draw at random, so that mergekit cannot replay a recipe bit for bit."""

_UNSUPPORTED = {
    "slices": "Write models; what varies over depth is a layer curve or a rule under parameters.",
    "modules": "Write models; the tensors of all modules are merged.",
    "tokenizer": "Write tokenizer_source: base, or one of the models.",
    "chat_template": "The template of the tokenizer's donor is copied.",
}
_HEADER = "# evomerge recipe; mergekit 0.1.5 reads it too\n"
_RANDOM = "# not to be replayed by mergekit: its random masks are others than those of evomerge\n"
_LOW_PRECISION = "# mergekit computes in dtype, evomerge in float32: the two differ by rounding\n"


_SETTING: TypeAdapter[Setting] = TypeAdapter(
    Setting, config=ConfigDict(strict=True, allow_inf_nan=False)
)


def _setting(value: Any) -> Setting:
    setting: Setting = ()
    with suppress(ValidationError):
        setting = _SETTING.validate_json(json.dumps([value] if isinstance(value, dict) else value))
    if setting == ():
        raise ValueError(
            f"came {value!r}; a number, true or false, a list of numbers (a layer curve), or a "
            "list of rules {filter, value} is needed."
        )
    return setting


def _without_lora(value: Any) -> Any:
    if isinstance(value, str) and "+" in value:
        raise ValueError(
            f"came {value!r}; LoRA references (model+adapter) are not supported yet. "
            "Merge the adapter into its model first and name that."
        )
    return value


def _one_vocabulary(value: str | None) -> str | None:
    if value == "union":
        raise ValueError(
            "came 'union', which is not supported yet. Use base, or one of the models."
        )
    return value


_Parameters = dict[str, Annotated[Setting, PlainValidator(_setting)]]
_Model = Annotated[ModelRef, BeforeValidator(_without_lora)]


class _SourceFile(StrictModel):
    model: _Model
    parameters: _Parameters = Field(default_factory=dict)


class _Extras(StrictModel):
    mask_seed: int = Field(0, ge=0, lt=2**32)
    mask: str = MASK_VERSION


class _RecipeFile(StrictModel):
    """A mergekit file, as far as it is supported."""

    merge_method: str
    models: tuple[_SourceFile, ...] = Field(min_length=1)
    base_model: _Model | None = None
    parameters: _Parameters = Field(default_factory=dict)
    dtype: DtypeName | None = None
    out_dtype: DtypeName | None = None
    tokenizer_source: Annotated[str | None, BeforeValidator(_one_vocabulary)] = None
    evomerge: _Extras = _Extras()


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a mergekit YAML file; relative paths in it start at its folder.

    Raises:
        ConfigError: The file cannot be read, or one line for every problem in it.
    """
    data, origin = read_yaml(path)
    return _recipe(data, origin, Path(path).parent)


def parse_recipe(text: str, name: str = "<recipe>", folder: Path | None = None) -> Recipe:
    """Parse a recipe from mergekit YAML.

    Args:
        text: The YAML.
        name: Stands for the file in messages.
        folder: Where relative paths start; None leaves them as they are.

    Raises:
        ConfigError: One line for every problem.
    """
    data, origin = parse_yaml(text, name)
    return _recipe(data, origin, folder)


def _recipe(data: Any, origin: Origin, folder: Path | None) -> Recipe:
    if isinstance(data, dict):
        _refuse_unsupported(data, origin)
    file = validate(_RecipeFile, data, origin)
    if file.evomerge.mask != MASK_VERSION:
        raise ConfigError(
            f"{origin.at('evomerge', 'mask')}: came {file.evomerge.mask!r}, this version draws "
            f"{MASK_VERSION!r}. Use the evomerge that wrote the recipe, or remove the key and "
            "accept other masks."
        )
    tokenizer = file.tokenizer_source
    if tokenizer not in (None, "base"):
        tokenizer = str(_placed(ModelRef.model_validate(tokenizer), folder))
    return Recipe(
        merge_method=file.merge_method,
        models=tuple(
            Source(model=_placed(source.model, folder), parameters=source.parameters)
            for source in file.models
        ),
        base_model=_placed(file.base_model, folder) if file.base_model else None,
        parameters=file.parameters,
        dtype=file.dtype,
        out_dtype=file.out_dtype,
        tokenizer_source=tokenizer,
        mask_seed=file.evomerge.mask_seed,
    )


def _refuse_unsupported(data: dict[str, Any], origin: Origin) -> None:
    problems = [
        f"{origin.at(key)}: is not supported yet. {advice}"
        for key, advice in _UNSUPPORTED.items()
        if key in data
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _placed(reference: ModelRef, folder: Path | None) -> ModelRef:
    return reference if folder is None else reference.relative_to(folder)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around every text that the strict reader would take for a number."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[\d._]+([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


def write_recipe(recipe: Recipe) -> str:
    """Return a recipe as mergekit YAML; `parse_recipe` gives back an equal recipe.

    Numbers are written with all their digits. The key `evomerge` is there only where random masks
    matter.
    """
    fields = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"mask_seed"})
    random = recipe.merge_method in RANDOM_METHODS
    if random or recipe.mask_seed:
        fields["evomerge"] = {"mask_seed": recipe.mask_seed, "mask": MASK_VERSION}
    notes = (_RANDOM if random else "") + (_LOW_PRECISION if recipe.dtype != "float32" else "")
    text = yaml.dump(fields, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)
    return _HEADER + notes + text
