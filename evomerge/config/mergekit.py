"""Recipes as mergekit YAML, both ways: mergekit 0.1.5 reads what we write, and we what it reads.

All of its fields are read and written, and besides a key `evomerge` that it ignores. `modules` is
read where all of them are alike, and written as what is in them. Unknown keys are errors.

Where evomerge does otherwise than mergekit 0.1.5, and why:

- Arithmetic is float32 whatever `dtype` says, and the result is rounded once. mergekit casts the
  inputs to `dtype` and, except in linear and slerp, computes in it, weights included: in bfloat16 a
  weight that changes by 0.001 changes nothing. To compare the two, set `dtype: float32`.
- Without `dtype` and `out_dtype` a tensor keeps the base's dtype (or the first model's); mergekit
  takes the widest of all models'. A parent in float32 should not double the size of a merge.
- DARE's random masks are drawn from counters, so that every machine draws the same; mergekit's come
  from one generator and depend on the order of all draws before. Same distribution, other masks.
- TIES keeps all elements that equal the smallest one kept, unless `threshold_ties` says otherwise,
  and compares magnitudes at the precision of the checkpoints; mergekit takes whichever of them its
  sort puts first.
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
- Without a base, config and tokenizer come from the first model; mergekit takes any one of them,
  and not always the same.
- A recipe may stack layers of any model that has numbered layers, also of one with several modules:
  `slices` are of the language model's, the rest comes with the first. `modules` that differ are
  refused: all tensors are merged by name, and a rule with a filter tells modules apart.
- Stacked models must have the tensors that the config donor's layers have, in its shapes; mergekit
  writes a model that cannot be loaded. What config.json says per layer goes with the layers;
  mergekit changes their number alone.
- slerp, nuslerp: a cosine below -0.9995 between whole tensors is an error, because the arc may go
  any way round; mergekit takes the straight line, or divides by a small sine. karcher: so is a
  model opposite to the mean. A tensor of one number takes the straight line.
- nuslerp: weights that add up to less than 1e-6 are an error; mergekit takes the middle of the arc.
  multislerp: directions that cancel are an error for two models too; mergekit sums the two.
- multislerp: where all task vectors are 0 the base stays; mergekit stops from three models on.
  Weights that add up to 0 are refused before the merge.
- slerp, nuslerp, multislerp, karcher, model_stock: coefficients come from inner products in
  float64, then one weighted sum in float32; mergekit's float32 sums are off by up to 3e-5 on
  tensors of a million elements.
- arcee_fusion: quantiles are exact in tensors above a million elements too; mergekit draws a
  random million.
- breadcrumbs and sce keep all elements that equal one that is kept, as TIES does; breadcrumbs at
  its lower end unless `threshold_ties` says otherwise.
- della ranks equal elements alike and rounds ranks to 1/254; in a row of one element `density` is
  the chance, where mergekit fails.
- ramplus_tl with `epsilon: 0` and no element of one model alone takes the limit, not 0/0.
- Vocabularies: see `merging/vocabulary.py`. An adapter's product is computed in float64 and rounded
  once to float32 (`adapters/`); mergekit writes the merged adapter in its `--lora-merge-dtype`.
- consensus, fourier, iso_c, pcb, tsv, `rescale_by_density` of DARE, `trim_whole_model` of TIES, and
  `threshold_ties` and `rounding` under `evomerge` are ours alone; a recipe's header says so.
- `residual_weight` of a slice, which mergekit reads and does not use, is an unknown key.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from evomerge.config.models import ModelRef
from evomerge.config.recipe import Recipe, Rule, Setting
from evomerge.config.recipe_file import ModuleFile, RecipeFile, placed
from evomerge.config.strict import Origin, StrictModel, parse_yaml, read_yaml, validate
from evomerge.config.tokenizer import ModelToken, TokenizerConfig, TokenSource
from evomerge.errors import ConfigError

MASK_VERSION = "philox4x32-7"
"""Names the random masks that a recipe's `mask_seed` stands for; changes whenever they would."""

RANDOM_METHODS = ("dare_linear", "dare_ties", "della", "della_linear")
"""mergekit's methods that draw at random, so that mergekit cannot replay a recipe bit for bit."""

OWN_SETTINGS = ("threshold_ties", "rounding")
"""Settings of a recipe that mergekit does not have; they stand under `evomerge`."""

_SPARSE = ("weight", "density", "normalize", "rescale", "lambda", "int8_mask")
MERGEKIT_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "arcee_fusion": (),
    "breadcrumbs": (*_SPARSE, "gamma"),
    "breadcrumbs_ties": (*_SPARSE, "gamma"),
    "dare_linear": _SPARSE,
    "dare_ties": _SPARSE,
    "della": (*_SPARSE, "epsilon"),
    "della_linear": (*_SPARSE, "epsilon"),
    "karcher": ("max_iter", "tol"),
    "linear": ("weight", "normalize"),
    "model_stock": ("filter_wise",),
    "multislerp": ("weight", "normalize_weights", "eps"),
    "nearswap": ("t",),
    "nuslerp": ("weight", "nuslerp_row_wise", "nuslerp_flatten"),
    "passthrough": ("scale",),
    "ram": ("epsilon",),
    "ramplus_tl": ("r", "alpha", "epsilon"),
    "sce": ("int8_mask", "select_topk"),
    "slerp": ("t",),
    "task_arithmetic": _SPARSE,
    "ties": _SPARSE,
}
"""mergekit's methods and the parameters that it looks at in each."""

_HEADER = "# evomerge recipe\n"
_HEADER_OF_BOTH = "# evomerge recipe; mergekit 0.1.5 reads it too\n"
_RANDOM = "# not to be replayed by mergekit: its random masks are others than those of evomerge\n"
_LOW_PRECISION = "# mergekit computes in dtype, evomerge in float32: the two differ by rounding\n"


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
    file = validate(RecipeFile, data, origin)
    if file.evomerge.mask not in (None, MASK_VERSION):
        raise ConfigError(
            f"{origin.at('evomerge', 'mask')}: came {file.evomerge.mask!r}, this version draws "
            f"{MASK_VERSION!r}. Use the evomerge that wrote the recipe, or remove the key and "
            "accept other masks."
        )
    content = _content(file, origin)
    return Recipe(
        merge_method=file.merge_method,
        models=tuple(source.source(folder) for source in content.models),
        slices=tuple(part.slice(folder) for part in content.slices),
        base_model=file.base_model and placed(file.base_model, folder),
        parameters=content.parameters,
        dtype=file.dtype,
        out_dtype=file.out_dtype,
        tokenizer_source=_placed_name(file.tokenizer_source, folder),
        tokenizer=_placed_tokenizer(file.tokenizer, folder),
        chat_template=file.chat_template,
        mask_seed=file.evomerge.mask_seed,
        threshold_ties=file.evomerge.threshold_ties,
        rounding=file.evomerge.rounding,
    )


def _content(file: RecipeFile, origin: Origin) -> ModuleFile:
    """Return models or slices with the parameters that hold for them, wherever they stand."""
    _one_of(file, ("models", "slices", "modules"), origin)
    if file.tokenizer and file.tokenizer_source:
        raise ConfigError(
            f"{origin.at('tokenizer')}: tokenizer_source is given too. Keep tokenizer, and write "
            "the other as its source."
        )
    if not file.modules:
        return file
    (name, module), *others = file.modules.items()
    _one_of(module, ("models", "slices"), origin, "modules", name)
    if others and (module.slices or any(other != module for _, other in others)):
        raise ConfigError(
            f"{origin.at('modules')}: {', '.join(file.modules)} differ, or have slices. Write "
            "models, or slices of the language model's layers, without modules: the tensors of all "
            "modules are merged by name. What differs between modules is a rule under parameters, "
            "as in {filter: vision_tower, value: 0.5}."
        )
    return module.model_copy(update={"parameters": _first_of(module.parameters, file.parameters)})


def _one_of(file: StrictModel, names: tuple[str, ...], origin: Origin, *place: str) -> None:
    found = [name for name in names if getattr(file, name)]
    if len(found) != 1:
        came = " and ".join(found) or "none"
        raise ConfigError(
            f"{origin.at(*place, *found[1:2])}: one of {', '.join(names)} is needed, and {came} "
            "came."
        )


def _first_of(nearer: Mapping[str, Setting], farther: Mapping[str, Setting]) -> dict[str, Setting]:
    """Join two levels of parameters: where the rules of the nearer miss, the farther counts."""
    joined = {**farther, **nearer}
    for name in nearer.keys() & farther.keys():
        own = nearer[name]
        if isinstance(own, tuple) and isinstance(own[0], Rule):
            joined[name] = (*_as_rules(own), *_as_rules(farther[name]))
    return {name: joined[name] for name in dict.fromkeys([*nearer, *farther])}


def _as_rules(setting: Setting) -> tuple[Rule, ...]:
    if not isinstance(setting, tuple):
        return (Rule(value=setting),)
    rules = tuple(part for part in setting if isinstance(part, Rule))
    return rules or (Rule(value=tuple(part for part in setting if not isinstance(part, Rule))),)


def _placed_name(name: str | None, folder: Path | None) -> str | None:
    if name in (None, "base", "union"):
        return name
    return str(placed(ModelRef.model_validate(name), folder))


def _placed_tokenizer(
    tokenizer: TokenizerConfig | None, folder: Path | None
) -> TokenizerConfig | None:
    if tokenizer is None:
        return None
    tokens = {
        token: rows.model_copy(update={"source": _placed_rows(rows.source, folder)})
        for token, rows in tokenizer.tokens.items()
    }
    source = _placed_name(tokenizer.source, folder)
    return tokenizer.model_copy(update={"source": source, "tokens": tokens})


def _placed_rows(source: TokenSource | None, folder: Path | None) -> TokenSource | None:
    if isinstance(source, ModelRef):
        return placed(source, folder)
    if isinstance(source, ModelToken):
        return source.model_copy(update={"model": placed(source.model, folder)})
    return source


class _Dumper(yaml.SafeDumper):
    """Puts quotes around every text that the strict reader would take for a number."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[\d._]+([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


def write_recipe(recipe: Recipe) -> str:
    """Return a recipe as mergekit YAML; `parse_recipe` gives back an equal recipe.

    Numbers are written with all their digits. The key `evomerge` is there only where it matters.
    """
    fields = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"mask_seed"})
    if recipe.tokenizer is not None:
        fields["tokenizer"] = {"source": recipe.tokenizer.source, **fields["tokenizer"]}
    extras = {name: fields.pop(name) for name in OWN_SETTINGS if name in fields}
    if draws(recipe) or recipe.mask_seed:
        extras = {"mask_seed": recipe.mask_seed, "mask": MASK_VERSION, **extras}
    if extras:
        fields["evomerge"] = extras
    text = yaml.dump(fields, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)
    return "".join(_notes(recipe)) + text


def draws(recipe: Recipe) -> bool:
    """Whether a merge draws random numbers, so that its `mask_seed` matters."""
    at_random = recipe.threshold_ties == "hash" or recipe.rounding == "dither"
    return at_random or recipe.merge_method in RANDOM_METHODS


def _notes(recipe: Recipe) -> Iterator[str]:
    """Yield the comments on top: who else reads the recipe, and to what effect."""
    known = MERGEKIT_PARAMETERS.get(recipe.merge_method)
    if known is None:
        yield _HEADER
        name = _one_line(recipe.merge_method)
        yield f"# not to be replayed by mergekit: it has no method {name}\n"
        return
    yield _HEADER_OF_BOTH
    levels = [recipe.parameters, *(part.parameters for part in recipe.slices)]
    levels += [source.parameters for source in recipe.sources]
    names = dict.fromkeys(name for level in levels for name in level if name not in known)
    names |= recipe.model_dump(include=set(OWN_SETTINGS), exclude_defaults=True)
    if names:
        yield f"# not to be replayed by mergekit: it ignores {_one_line(', '.join(names))}\n"
    if recipe.merge_method in RANDOM_METHODS:
        yield _RANDOM
    if recipe.dtype != "float32":
        yield _LOW_PRECISION


def _one_line(text: str) -> str:
    return text if text.isprintable() else repr(text)
