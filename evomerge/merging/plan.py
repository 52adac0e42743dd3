"""MergePlan: a recipe bound to models, one job per tensor. All checks, no reads."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from evomerge.checkpoints.shards import TensorSpec
from evomerge.checkpoints.source import TensorSource
from evomerge.config.layout import Layout
from evomerge.config.recipe import Recipe, Setting
from evomerge.config.resolve import rules_of
from evomerge.kernels.masks import MaskKey
from evomerge.merging.checks import (
    config_problems,
    layer_problems,
    model_problems,
    parameter_problems,
    rounding_problem,
    stop_at,
    tensor_problems,
)
from evomerge.merging.groups import GroupFinder, Groups
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

    def dither(self, spec: TensorSpec) -> MaskKey | None:
        """Return what a merged tensor is rounded at random for; None rounds it to nearest."""
        if self.recipe.rounding == "nearest" or spec.dtype is not torch.bfloat16:
            return None
        return MaskKey(self.recipe.mask_seed, spec.name)


@dataclass(frozen=True)
class Outline:
    """A plan without numbers: what all recipes of one form (`form_of`) have in common.

    Attributes:
        method: Their method.
        layers: As in a plan.
        jobs: As in a plan, without values; and the number of the group whose values each takes,
            None for a tensor that is copied.
        groups: Which tensors take the same values.
    """

    method: Method
    layers: tuple[int, ...] | None
    jobs: tuple[tuple[TensorJob, int | None], ...]
    groups: Groups

    def plan(self, recipe: Recipe) -> MergePlan:
        """Return the plan of a recipe.

        Args:
            recipe: Any of the outline's form.

        Raises:
            MergeError: Its numbers are not those of a merge; one line for each of the first
                problems.
        """
        values = self.groups.values(recipe)
        jobs = [
            job if group is None else TensorJob(job.spec, values[group], job.base, job.parents)
            for job, group in self.jobs
        ]
        return MergePlan(recipe, self.method, self.layers, tuple(jobs))


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
    return make_outline(recipe, sources, layout).plan(recipe)


def make_outline(recipe: Recipe, sources: Mapping[str, TensorSource], layout: Layout) -> Outline:
    """Do as much of `make_plan` as holds for all recipes of the same form.

    Raises:
        ConfigError, MergeError: As `make_plan`, as far as the numbers have no part in it.
    """
    method = METHODS[recipe.merge_method]
    parts = parts_of(recipe, layout)
    stop_at([*model_problems(recipe, method, parts), *parameter_problems(recipe, method)])
    stop_at(layer_problems(recipe, parts, sources, layout))
    bound = [bind(part, method, sources, layout.layer_prefix) for part in parts]
    stop_at(problem for part in bound for problem in tensor_problems(part))
    stop_at(config_problems(recipe, bound, sources, layout))
    finder = GroupFinder(recipe, method, bound, layout)
    jobs: list[tuple[TensorJob, int | None]] = []
    for place, part in enumerate(bound):
        for name in part.donor.given:
            job = _job(recipe, part, name)
            merged = job.spec.dtype.is_floating_point
            jobs.append((job, finder.group_of(place, name) if merged else None))
    dtypes = (job.spec.dtype for job, group in jobs if group is not None)
    unfit = rounding_problem(recipe.rounding, dtypes)
    stop_at([f"evomerge.rounding: {unfit}"] if unfit else [])
    jobs.sort(key=lambda pair: pair[0].spec.name)
    layers = output_depth(recipe, layout)
    return Outline(
        method=method,
        layers=None if layers == list(range(layout.num_layers)) else tuple(layers),
        jobs=tuple(jobs),
        groups=finder.found(),
    )


def _job(recipe: Recipe, bound: BoundPart, name: str) -> TensorJob:
    return TensorJob(
        spec=_spec(recipe, bound.donor, name),
        values=None,
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


_FORM = tuple(
    name
    for name in Recipe.model_fields
    if name not in ("models", "slices", "parameters", "tokenizer", "mask_seed")
)
"""Fields of a recipe that count for its form as they are."""


def form_of(recipe: Recipe) -> Hashable:
    """Return a recipe without the numbers of its parameters; equal for recipes of one outline.

    How many numbers a curve has and what rules look for belong to the form.
    """
    models = [(each.model, _unnumbered(each.parameters)) for each in recipe.models]
    slices = [
        (
            part.base_model,
            _unnumbered(part.parameters),
            tuple((s.model, s.layer_range, _unnumbered(s.parameters)) for s in part.sources),
        )
        for part in recipe.slices
    ]
    others = [getattr(recipe, name) for name in _FORM]
    # may hold dicts, which have no hash
    tokenizer = repr(recipe.tokenizer)
    return (*others, tokenizer, *models, *slices, _unnumbered(recipe.parameters))


def _unnumbered(parameters: Mapping[str, Setting]) -> Hashable:
    return tuple([(name, _shape_of(setting)) for name, setting in parameters.items()])


def _shape_of(setting: Setting) -> Hashable:
    """Return None for a number, a curve's length, or what rules look for and hold."""
    if not isinstance(setting, tuple):
        return None
    rules = rules_of(setting)
    if rules is None:
        return len(setting)
    return tuple([(rule.filter, _shape_of(rule.value)) for rule in rules])
