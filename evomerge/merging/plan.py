"""MergePlan: a recipe bound to models, one job per tensor. All checks, no reads."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from evomerge.checkpoints.source import TensorSource
from evomerge.checkpoints.writer import TensorSpec
from evomerge.config.layout import Layout
from evomerge.config.recipe import Recipe, Source
from evomerge.config.resolve import parameter_at
from evomerge.errors import MergeError
from evomerge.merging.checks import (
    model_problems,
    parameter_problems,
    parents_of,
    stop_at,
    tensor_problems,
)
from evomerge.methods import METHODS
from evomerge.methods.method import Method, Values


@dataclass(frozen=True)
class TensorJob:
    """What is to be done for one tensor.

    Attributes:
        spec: Name, the same in every model; shape; dtype of the result.
        values: The method's parameters for it; None for integers and booleans, which are copied
            and must agree.
    """

    spec: TensorSpec
    values: Values | None


@dataclass(frozen=True)
class MergePlan:
    """A recipe bound to models: everything but the tensors' numbers.

    Attributes:
        recipe: The merge.
        method: Its method.
        base: The base model as the recipe writes it; None where the method needs none.
        parents: The models that are merged, as the recipe writes them, in its order.
        jobs: One for each tensor, sorted by name.
    """

    recipe: Recipe
    method: Method
    base: str | None
    parents: tuple[str, ...]
    jobs: tuple[TensorJob, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that is read: the base, if the method needs one, and the parents."""
        return self.parents if self.base is None else (self.base, *self.parents)


def make_plan(recipe: Recipe, sources: Mapping[str, TensorSource], layout: Layout) -> MergePlan:
    """Bind a recipe to the models it names, and check that it is a merge of them.

    Args:
        recipe: The merge.
        sources: The models' tensors, by the references as the recipe writes them
            (`str(ModelRef)`).
        layout: The layers of the recipe's donor, which layer curves refer to.

    Raises:
        ConfigError: There is no such merge method.
        MergeError: The recipe is not a merge of these models; one line for each of the first
            problems.
    """
    method = METHODS[recipe.merge_method]
    stop_at([*model_problems(recipe, method), *parameter_problems(recipe, method)])
    parents = parents_of(recipe, method)
    stop_at(tensor_problems(recipe, sources))
    donor = sources[str(recipe.donor)]
    values = _values_of_all(recipe, method, parents, layout, donor)
    return MergePlan(
        recipe=recipe,
        method=method,
        base=_base_of(recipe, method),
        parents=tuple(str(source.model) for source in parents),
        jobs=tuple(
            TensorJob(_spec(recipe, donor, name), values.get(name)) for name in donor.names()
        ),
    )


def _base_of(recipe: Recipe, method: Method) -> str | None:
    has_deltas = method.has_deltas(recipe.base_model is not None)
    return str(recipe.base_model) if has_deltas else None


def _spec(recipe: Recipe, donor: TensorSource, name: str) -> TensorSpec:
    dtype, wanted = donor.dtype(name), recipe.out_dtype or recipe.dtype
    if wanted and dtype.is_floating_point:
        dtype = getattr(torch, wanted)
    return TensorSpec(name, donor.shape(name), dtype)


def _values_of_all(
    recipe: Recipe,
    method: Method,
    parents: tuple[Source, ...],
    layout: Layout,
    donor: TensorSource,
) -> dict[str, Values]:
    values: dict[str, Values] = {}
    # what is wrong, and the first tensor where it is
    problems: dict[str, str] = {}
    for name in donor.names():
        if donor.dtype(name).is_floating_point:
            try:
                values[name] = _values_at(recipe, method, parents, layout, name)
            except MergeError as error:
                problems.setdefault(str(error).removeprefix(f"{name}: "), name)
    stop_at(f"{name}: {problem}" for problem, name in problems.items())
    return values


def _values_at(
    recipe: Recipe, method: Method, parents: tuple[Source, ...], layout: Layout, name: str
) -> Values:
    per_model = {
        param.name: tuple(
            float(parameter_at(param, name, layout, recipe, source)) for source in parents
        )
        for param in method.params
        if param.per_model
    }
    shared = {
        param.name: parameter_at(param, name, layout, recipe, None)
        for param in method.params
        if not param.per_model
    }
    values = Values(per_model, shared)
    problem = method.refuse(values)
    if problem:
        raise MergeError(f"{name}: {problem}")
    return values
