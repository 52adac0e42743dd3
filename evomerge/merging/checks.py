"""What keeps a recipe from being a merge of its models, found without reading a tensor."""

from collections.abc import Iterable, Iterator, Mapping

import torch

from evomerge.checkpoints.source import TensorSource
from evomerge.config.recipe import Recipe, Source
from evomerge.errors import MergeError
from evomerge.methods.method import Method
from evomerge.registry import did_you_mean

MERGED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that are merged. Integers and booleans are copied; other floats are refused."""

MAX_PROBLEMS = 5
"""Problems listed in one error."""

_CHECK = "These two models cannot be merged tensor by tensor; check base_model."


def stop_at(problems: Iterable[str]) -> None:
    """Raise what was found, if anything.

    Raises:
        MergeError: One line for each of the first problems, and how many there are more.
    """
    found = list(problems)
    if len(found) > MAX_PROBLEMS:
        found[MAX_PROBLEMS:] = [f"... and {len(found) - MAX_PROBLEMS} more of this kind."]
    if found:
        raise MergeError("\n".join(found))


def parents_of(recipe: Recipe, method: Method) -> tuple[Source, ...]:
    """Return the models that are merged, in order; what the base is to them see `Method.base`."""
    listed = [source.model for source in recipe.models]
    if method.base == "input" and recipe.base_model and recipe.base_model not in listed:
        return (Source(model=recipe.base_model), *recipe.models)
    if not method.has_deltas(recipe.base_model is not None):
        return recipe.models
    return tuple(source for source in recipe.models if source.model != recipe.base_model)


def model_problems(recipe: Recipe, method: Method) -> Iterator[str]:
    """Yield what is wrong with the choice of models."""
    names = [str(source.model) for source in recipe.models]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"models: {name} stands twice. List it once, with the sum of its weights."
    if method.needs_base and recipe.base_model is None:
        yield f"base_model: {method.name} needs one, and the recipe gives none. Add it."
    if method.base == "listed" and recipe.base_model and str(recipe.base_model) not in names:
        yield (
            f"base_model: {method.name} merges the listed models only, and {recipe.base_model} is "
            "not among them. List it under models, or remove base_model."
        )
    if method.has_deltas(recipe.base_model is not None):
        for source in recipe.models:
            if source.model == recipe.base_model and source.parameters:
                yield (
                    f"models: {source.model} is the base, so its {', '.join(source.parameters)} "
                    f"would have no effect in {method.name}. Remove its parameters."
                )
    yield from _number_of_parents(recipe, method)


def _number_of_parents(recipe: Recipe, method: Method) -> Iterator[str]:
    parents = [str(source.model) for source in parents_of(recipe, method)]
    most = method.max_parents or len(parents)
    if not method.min_parents <= len(parents) <= most:
        least = method.min_parents
        allowed = f"exactly {least}" if least == method.max_parents else f"at least {least}"
        besides = " besides the base" if method.has_deltas(bool(recipe.base_model)) else ""
        came = f"{len(parents)} ({', '.join(parents)})" if parents else "none"
        yield f"models: {method.name} takes {allowed}{besides}, and {came} came."


def parameter_problems(recipe: Recipe, method: Method) -> Iterator[str]:
    """Yield parameters that the method does not have, or that stand in the wrong place."""
    known = [param.name for param in method.params]
    per_model = [param.name for param in method.params if param.per_model]
    for name in recipe.parameters:
        if name not in known:
            yield f"parameters: {method.name} has no {name!r}.{did_you_mean(name, known)}"
    for source in recipe.models:
        for name in source.parameters:
            if name in known and name not in per_model:
                yield (
                    f"{source.model}: {name} is one value for all models in {method.name}. "
                    "Write it under the recipe's own parameters."
                )
            elif name not in known:
                yield (
                    f"{source.model}: {method.name} has no parameter {name!r}."
                    f"{did_you_mean(name, per_model)}"
                )


def tensor_problems(recipe: Recipe, sources: Mapping[str, TensorSource]) -> Iterator[str]:
    """Yield tensors that are missing, extra, of another shape, or of a dtype that does not fit."""
    donor_name = str(recipe.donor)
    donor = sources[donor_name]
    who = f"base {donor_name}" if recipe.base_model else donor_name
    for name in donor.names():
        if donor.dtype(name).is_floating_point and donor.dtype(name) not in MERGED_DTYPES:
            yield _unmergeable(name, donor_name, donor.dtype(name))
    for model in map(str, recipe.references()):
        if model != donor_name:
            yield from _missing_and_extra(model, sources[model], who, donor)
            yield from _differences(model, sources[model], who, donor)


def _missing_and_extra(
    model: str, source: TensorSource, who: str, donor: TensorSource
) -> Iterator[str]:
    names, donor_names = set(source.names()), set(donor.names())
    missing = [name for name in donor.names() if name not in names]
    if missing:
        yield f"{model}: lacks {_first(missing, source)}, which {who} has. {_CHECK}"
    extra = [name for name in source.names() if name not in donor_names]
    if extra:
        yield f"{model}: has {_first(extra, donor)}, which {who} lacks. {_CHECK}"


def _first(names: list[str], without: TensorSource) -> str:
    shown = [
        f"{name} (tied to {without.tied[name]} there)" if name in without.tied else name
        for name in names[:3]
    ]
    return ", ".join(shown) + (f" and {len(names) - 3} tensors more" if names[3:] else "")


def _differences(model: str, source: TensorSource, who: str, donor: TensorSource) -> Iterator[str]:
    for name in donor.names():
        if name not in source:
            continue
        shape, dtype = source.shape(name), source.dtype(name)
        if shape != donor.shape(name):
            yield f"{name}: {model} has {shape}, {who} has {donor.shape(name)}. {_CHECK}"
        both_float = dtype.is_floating_point and donor.dtype(name).is_floating_point
        if both_float and dtype not in MERGED_DTYPES:
            yield _unmergeable(name, model, dtype)
        if not both_float and dtype != donor.dtype(name):
            yield f"{name}: {model} stores {dtype}, {who} stores {donor.dtype(name)}. {_CHECK}"


def _unmergeable(name: str, model: str, dtype: torch.dtype) -> str:
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in MERGED_DTYPES)
    return (
        f"{name}: {model} stores {str(dtype).removeprefix('torch.')}; merged are {allowed}. "
        "Convert the model first."
    )
