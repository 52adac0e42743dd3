"""What keeps a recipe from being a merge of its models, found without reading a tensor."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from evomerge.checkpoints.architecture import embedding_and_head
from evomerge.checkpoints.source import TensorSource
from evomerge.config.layout import Layout
from evomerge.config.recipe import Recipe, Rounding, ThresholdTies
from evomerge.errors import MergeError
from evomerge.merging.parts import BoundPart, Member, Part, moved, names_by_layer, output_depth
from evomerge.methods.method import Method
from evomerge.registry import did_you_mean

MERGED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that are merged. Integers and booleans are copied; other floats are refused."""

MAX_PROBLEMS = 5
"""Problems listed in one error."""

_CHECK = "These two models cannot be merged tensor by tensor; check base_model."
_ALIGN = (
    "Their vocabularies differ; have them aligned with tokenizer_source: union (or base), or with "
    "tokenizer: {source: union}."
)


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


def model_problems(recipe: Recipe, method: Method, parts: Sequence[Part]) -> Iterator[str]:
    """Yield what is wrong with the choice of models."""
    if method.needs_base and any(part.base_model is None for part in parts):
        yield f"base_model: {method.name} needs one, and the recipe gives none. Add it."
    if not method.has_deltas(True):
        yield from _bases_without_effect(recipe, method)
    for part in parts:
        yield from _twice(part)
        if part.base_model and part.base is None and method.has_deltas(True):
            yield (
                f"{part.where}: {part.base_model}, the base, is not among its sources, so it is "
                "not known which of its layers count. List it with a layer_range."
            )
        elif not (method.needs_base and part.base_model is None):
            yield from _about_parents(part, method)


def _bases_without_effect(recipe: Recipe, method: Method) -> Iterator[str]:
    models = [source.model for source in recipe.models]
    unlisted = models and recipe.base_model and recipe.base_model not in models
    if unlisted and method.base == "listed":
        yield (
            f"base_model: {method.name} merges the listed models only, and {recipe.base_model} is "
            "not among them. List it under models, or remove base_model."
        )
    for i, part in enumerate(recipe.slices):
        if part.base_model:
            yield (
                f"slices[{i}].base_model: {part.base_model} would have no effect in {method.name}. "
                "Remove it."
            )


def _twice(part: Part) -> Iterator[str]:
    names = [str(source.model) for source in part.sources]
    advice = "List it once, with the sum of its weights." if part.whole else "List it once."
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"{part.where}: {name} stands twice. {advice}"


def _about_parents(part: Part, method: Method) -> Iterator[str]:
    has_deltas = method.has_deltas(part.base is not None)
    if has_deltas:
        for source in part.sources:
            if source.model == part.base_model and source.parameters:
                yield (
                    f"{part.where}: {source.model} is the base, so its "
                    f"{', '.join(source.parameters)} would have no effect in {method.name}. "
                    "Remove its parameters."
                )
    parents = [str(source.model) for source in part.parents_of(method)]
    most = method.max_parents or len(parents)
    if not method.min_parents <= len(parents) <= most:
        least = method.min_parents
        allowed = f"exactly {least}" if least == method.max_parents else f"at least {least}"
        besides = " besides the base" if has_deltas else ""
        came = f"{len(parents)} ({', '.join(parents)})" if parents else "none"
        yield f"{part.where}: {method.name} takes {allowed}{besides}, and {came} came."


def parameter_problems(recipe: Recipe, method: Method) -> Iterator[str]:
    """Yield parameters that the method does not have, or that stand in the wrong place."""
    known = [param.name for param in method.params]
    per_model = [param.name for param in method.params if param.per_model]
    levels = [("parameters", recipe.parameters)]
    levels += [(f"slices[{i}].parameters", part.parameters) for i, part in enumerate(recipe.slices)]
    for where, parameters in levels:
        for name in parameters:
            if name not in known:
                yield f"{where}: {method.name} has no {name!r}.{did_you_mean(name, known)}"
    for source in recipe.sources:
        for name in source.parameters:
            if name in known and name not in per_model:
                yield (
                    f"{source.model}: {name} is one value for all models in {method.name}. "
                    f"Write it under the {'slice' if recipe.slices else 'recipe'}'s own parameters."
                )
            elif name not in known:
                yield (
                    f"{source.model}: {method.name} has no parameter {name!r}."
                    f"{did_you_mean(name, per_model)}"
                )
    problem = ties_problem(recipe.threshold_ties, method)
    if problem:
        yield f"evomerge.threshold_ties: {problem}"


def ties_problem(chosen: ThresholdTies, method: Method, whole_model: bool = False) -> str | None:
    """Say why a method cannot choose among elements that tie at a threshold; None where it can.

    Args:
        chosen: A recipe's `threshold_ties`.
        method: The method.
        whole_model: Whether its thresholds are for all tensors together.
    """
    if chosen == "keep":
        return None
    if not method.has_threshold:
        return (
            f"came {chosen}, and {method.name} keeps no elements down to a threshold. Remove it, "
            "or take ties or breadcrumbs."
        )
    if whole_model:
        return (
            f"came {chosen}, which counts within a tensor, and trim_whole_model is set. Remove one "
            "of the two."
        )
    return None


def rounding_problem(chosen: Rounding, dtypes: Iterable[torch.dtype]) -> str | None:
    """Say why merged tensors of some dtypes cannot be rounded so; None where they can.

    Args:
        chosen: A recipe's `rounding`.
        dtypes: Of the results, copied tensors left out. Some may be float32 beside bfloat16.
    """
    found = set(dtypes)
    if chosen == "nearest" or (torch.bfloat16 in found and torch.float16 not in found):
        return None
    written = "float16" if torch.float16 in found else "float32"
    return (
        f"came {chosen}, which is for bfloat16, and tensors of this merge are written as "
        f"{written}. Set out_dtype: bfloat16, or remove it."
    )


def layer_problems(
    recipe: Recipe, parts: Sequence[Part], sources: Mapping[str, TensorSource], layout: Layout
) -> Iterator[str]:
    """Yield layers that a slice wants and a model, or the donor's config, does not have."""
    if not recipe.slices:
        return
    depths = {
        str(model): 1 + max(names_by_layer(sources[str(model)], layout.layer_prefix), default=-1)
        for model in recipe.references()
    }
    out_of_range = [
        f"{part.where}: layer_range {list(source.layer_range)} of {source.model}, which has "
        f"{depths[str(source.model)]} layers. Choose among layers 0 to "
        f"{depths[str(source.model)] - 1}."
        for part in parts
        for source in part.sources
        if source.layer_range[1] > depths[str(source.model)]
    ]
    yield from out_of_range
    deepest = max(output_depth(recipe, layout))
    if not out_of_range and deepest >= depths[str(recipe.donor)]:
        yield (
            f"base_model: the merge has a layer {deepest}, and {recipe.donor}, whose config it "
            f"takes, has {depths[str(recipe.donor)]} layers. Name the deepest model as base_model, "
            "or list it first."
        )


def tensor_problems(bound: BoundPart) -> Iterator[str]:
    """Yield tensors that are missing, extra, of another shape, or of a dtype that does not fit."""
    donor, *others = bound.members
    for name, stored in donor.given.items():
        dtype = donor.tensors.dtype(stored)
        if dtype.is_floating_point and dtype not in MERGED_DTYPES:
            yield _unmergeable(name, donor.name, dtype)
    who = f"base {donor.name}" if bound.part.base else donor.name
    where = "" if bound.part.whole else f"{bound.part.where}: "
    for member in others:
        yield from _missing_and_extra(where, member, who, donor)
        yield from _differences(member, who, donor)


def _missing_and_extra(where: str, member: Member, who: str, donor: Member) -> Iterator[str]:
    missing = [name for name in donor.given if name not in member.given]
    if missing:
        lacks = _first(missing, member.tensors)
        yield f"{where}{member.name}: lacks {lacks}, which {who} has. {_CHECK}"
    extra = [name for name in member.given if name not in donor.given]
    if extra:
        has = _first(extra, donor.tensors)
        yield f"{where}{member.name}: has {has}, which {who} lacks. {_CHECK}"


def _first(names: list[str], without: TensorSource) -> str:
    shown = [
        f"{name} (tied to {without.tied[name]} there)" if name in without.tied else name
        for name in names[:3]
    ]
    return ", ".join(shown) + (f" and {len(names) - 3} tensors more" if names[3:] else "")


def _differences(member: Member, who: str, donor: Member) -> Iterator[str]:
    for name in donor.given:
        if name not in member.given:
            continue
        shape, dtype = _shape_and_dtype(member, name)
        donor_shape, donor_dtype = _shape_and_dtype(donor, name)
        if shape != donor_shape:
            rows_only = shape[1:] == donor_shape[1:] and name in embedding_and_head(donor.given)
            advice = _ALIGN if rows_only else _CHECK
            yield f"{name}: {member.name} has {shape}, {who} has {donor_shape}. {advice}"
        both_float = dtype.is_floating_point and donor_dtype.is_floating_point
        if both_float and dtype not in MERGED_DTYPES:
            yield _unmergeable(name, member.name, dtype)
        if not both_float and dtype != donor_dtype:
            yield f"{name}: {member.name} stores {dtype}, {who} stores {donor_dtype}. {_CHECK}"


def _shape_and_dtype(member: Member, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    stored = member.given[name]
    return member.tensors.shape(stored), member.tensors.dtype(stored)


def config_problems(
    recipe: Recipe,
    bound: Sequence[BoundPart],
    sources: Mapping[str, TensorSource],
    layout: Layout,
) -> Iterator[str]:
    """Yield tensors that do not fit the config of the donor, where layers are stacked."""
    if not recipe.slices:
        return
    donor, prefix = sources[str(recipe.donor)], layout.layer_prefix
    by_layer = names_by_layer(donor, prefix)
    described = {name: name for _, name in layout.outside}
    for place, layer in enumerate(output_depth(recipe, layout)):
        described |= moved(by_layer[layer], prefix, layer, place)
    wanted = {name: donor.shape(stored) for name, stored in described.items()}
    made = {
        name: part.donor.tensors.shape(stored)
        for part in bound
        for name, stored in part.donor.given.items()
    }
    for name in sorted(wanted.keys() | made.keys()):
        if wanted.get(name) != made.get(name):
            yield (
                f"{name}: the slices make {_shown(made.get(name))}, and the config of "
                f"{recipe.donor}, which the merge takes, wants {_shown(wanted.get(name))}. "
                "Stack models of one shape, or name another as base_model."
            )


def _shown(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else str(shape)


def _unmergeable(name: str, model: str, dtype: torch.dtype) -> str:
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in MERGED_DTYPES)
    return (
        f"{name}: {model} stores {str(dtype).removeprefix('torch.')}; merged are {allowed}. "
        "Convert the model first."
    )
