"""MergePlan: a recipe bound to models, one job per tensor. All checks, no reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from evomerge.checkpoints.shards import TensorSpec
from evomerge.checkpoints.source import TensorSource
from evomerge.config.layout import Layout
from evomerge.config.params import Param
from evomerge.config.recipe import Recipe
from evomerge.config.resolve import Levels, Position, parameter_at
from evomerge.errors import MergeError
from evomerge.merging.checks import (
    config_problems,
    layer_problems,
    model_problems,
    parameter_problems,
    stop_at,
    tensor_problems,
)
from evomerge.merging.parts import BoundPart, Member, bind, output_depth, parts_of
from evomerge.methods import METHODS
from evomerge.methods.method import Method, Values


class TensorInput(NamedTuple):
    """A tensor that is read.

    Attributes:
        model: The model as the recipe writes it.
        name: The tensor's name in it.
    """

    model: str
    name: str


@dataclass(frozen=True)
class TensorJob:
    """What is to be done for one tensor.

    Attributes:
        spec: Name and shape; dtype of the result.
        values: The method's parameters for it; None for integers and booleans, which are copied
            and must agree.
        base: The base's tensor; None where no task vectors are made.
        parents: The tensors that are merged, in the order of their models.
    """

    spec: TensorSpec
    values: Values | None
    base: TensorInput | None
    parents: tuple[TensorInput, ...]

    @property
    def inputs(self) -> tuple[TensorInput, ...]:
        """Every tensor that is read, the base's first."""
        return self.parents if self.base is None else (self.base, *self.parents)


@dataclass(frozen=True)
class MergePlan:
    """A recipe bound to models: everything but the tensors' numbers.

    Attributes:
        recipe: The merge.
        method: Its method.
        layers: For each layer of the merge, the layer of the recipe's donor that its config
            describes it by; None where the merge has the donor's layers in their order.
        jobs: One for each tensor, sorted by name.
    """

    recipe: Recipe
    method: Method
    layers: tuple[int, ...] | None
    jobs: tuple[TensorJob, ...]


def make_plan(recipe: Recipe, sources: Mapping[str, TensorSource], layout: Layout) -> MergePlan:
    """Bind a recipe to the models it names, and check that it is a merge of them.

    Args:
        recipe: The merge.
        sources: The models' tensors, by the references as the recipe writes them
            (`str(ModelRef)`).
        layout: The layers of the recipe's donor.

    Raises:
        ConfigError: There is no such merge method.
        MergeError: The recipe is not a merge of these models; one line for each of the first
            problems.
    """
    method = METHODS[recipe.merge_method]
    parts = parts_of(recipe, layout)
    stop_at([*model_problems(recipe, method, parts), *parameter_problems(recipe, method)])
    stop_at(layer_problems(recipe, parts, sources, layout))
    bound = [bind(part, method, sources, layout.layer_prefix) for part in parts]
    stop_at(problem for part in bound for problem in tensor_problems(part))
    stop_at(config_problems(recipe, bound, sources, layout))
    jobs: list[TensorJob] = []
    problems: dict[str, str] = {}
    for part in bound:
        for name in part.donor.given:
            try:
                jobs.append(_job(recipe, method, part, layout, name))
            except MergeError as error:
                # what is wrong, and the first tensor where it is
                problems.setdefault(str(error).partition(": ")[2], name)
    stop_at(f"{name}: {problem}" for problem, name in problems.items())
    layers = output_depth(recipe, layout)
    return MergePlan(
        recipe=recipe,
        method=method,
        layers=None if layers == list(range(layout.num_layers)) else tuple(layers),
        jobs=tuple(sorted(jobs, key=lambda job: job.spec.name)),
    )


def _job(recipe: Recipe, method: Method, bound: BoundPart, layout: Layout, name: str) -> TensorJob:
    spec = _spec(recipe, bound.donor, name)
    merged = spec.dtype.is_floating_point
    return TensorJob(
        spec=spec,
        values=_values_at(recipe, method, bound, layout, name) if merged else None,
        base=None if bound.base is None else _input(bound.base, name),
        parents=tuple(_input(parent, name) for parent in bound.parents),
    )


def _input(member: Member, name: str) -> TensorInput:
    return TensorInput(member.name, member.given[name])


def _spec(recipe: Recipe, donor: Member, name: str) -> TensorSpec:
    stored, wanted = donor.given[name], recipe.out_dtype or recipe.dtype
    dtype = donor.tensors.merged_dtype(stored)
    if wanted and dtype.is_floating_point:
        dtype = getattr(torch, wanted)
    return TensorSpec(name, donor.tensors.shape(stored), dtype)


def _values_at(
    recipe: Recipe, method: Method, bound: BoundPart, layout: Layout, name: str
) -> Values:
    part, layer = bound.part, layout.layer_of(name)
    position = Position(None if layer is None else layer - part.first_layer, part.num_layers)
    levels = (part.parameters, recipe.parameters)
    per_model = {
        param.name: tuple(
            float(_own_value(param, position, levels, method, parent, name))
            for parent in bound.parents
        )
        for param in method.params
        if param.per_model
    }
    shared = {
        param.name: parameter_at(param, name, position, levels, method.name)
        for param in method.params
        if not param.per_model
    }
    values = Values(per_model, shared)
    problem = method.refuse(values)
    if problem:
        raise MergeError(f"{name}: {', '.join(parent.name for parent in bound.parents)}: {problem}")
    return values


def _own_value(
    param: Param, position: Position, levels: Levels, method: Method, parent: Member, name: str
) -> float | bool:
    levels, given = (parent.parameters, *levels), parent.given[name]
    return parameter_at(param, given, position, levels, method.name, parent.name)
