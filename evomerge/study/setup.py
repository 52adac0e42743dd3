"""Setup: a search config resolved against real models and tasks, or all that is wrong with it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from evomerge.adapters.open import Model, fingerprint_of, open_model
from evomerge.checkpoints.architecture import layout_of
from evomerge.config.layout import Layout
from evomerge.config.models import DtypeName, ModelRef
from evomerge.config.params import Param
from evomerge.config.recipe import Recipe
from evomerge.config.search import BASE, SearchConfig, begins_with_field, place_problems
from evomerge.config.strict import dotted
from evomerge.errors import ConfigError, EvoMergeError
from evomerge.evaluate.evaluator import EvalResult, TaskMetric
from evomerge.evaluate.items import Used
from evomerge.evaluate.paired import Term, linearise
from evomerge.evaluate.racing import check_racing
from evomerge.evaluate.scores import Objective, Score, make_objective
from evomerge.evaluate.tasks import TaskSuite, load_tasks
from evomerge.merging.bind import ModelSet
from evomerge.merging.canonical import CanonicalForms
from evomerge.merging.checks import rounding_problem, ties_problem
from evomerge.methods import METHODS
from evomerge.methods.method import Method
from evomerge.propose import make_proposer
from evomerge.propose.proposer import AbstractProposer
from evomerge.registry import did_you_mean
from evomerge.seeds import stream_seed
from evomerge.space.decode import RecipeTemplate, decode
from evomerge.space.genome import Genome
from evomerge.space.space import Space, build_space
from evomerge.study.baselines import unfit_baselines
from evomerge.study.ledger import hash_of
from evomerge.study.liveness import Finding, find_dead_knobs

# a checkpoint of any other floating dtype cannot be opened
_FLOATS: Mapping[torch.dtype, DtypeName] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
Inputs = ParamSpec("Inputs")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Setup:
    """Everything about a search that is known before it runs.

    Attributes:
        config: The search config.
        folders: Folder of each model by name, the base first.
        fingerprints: Fingerprint of each model by name.
        layout: Layers of the models.
        out_dtype: Dtype of the merged models.
        num_bytes: Bytes of all models on disk.
        space: The knobs.
        template: What of a recipe does not vary.
        tasks: The loaded tasks.
        objective: What is optimised.
        merge_hash: Gives the hash that recipes of the same merge have in common.
        findings: What is wrong with knobs: nothing that keeps the search from running.
        unfit_baselines: Why baselines that the config asks for are no merges of these models.
        used: Items of earlier confirmations, which `tasks` leaves out.
    """

    config: SearchConfig
    folders: Mapping[str, Path]
    fingerprints: Mapping[str, str]
    layout: Layout
    out_dtype: DtypeName
    num_bytes: int
    space: Space
    template: RecipeTemplate
    tasks: TaskSuite
    objective: Objective
    merge_hash: Callable[[Recipe], str] = hash_of
    findings: tuple[Finding, ...] = ()
    unfit_baselines: Mapping[str, str] = field(default_factory=dict)
    used: Used = field(default_factory=dict)

    def proposer(self) -> AbstractProposer:
        """Make the proposer, fresh."""
        return _proposer(self.config, self.space)

    def metrics_of(self, result: EvalResult) -> dict[str, TaskMetric]:
        """Return the chosen metric of each task."""
        metrics = self.tasks.aggregate(result)
        return {task.name: metrics[task.name][task.metric] for task in self.tasks.scored}

    def score_of(
        self, metrics: Mapping[str, TaskMetric], parents: Sequence[Mapping[str, TaskMetric]]
    ) -> Score:
        """Return the objective of a model and its standard error.

        Args:
            metrics: The model's chosen metrics.
            parents: Those of each parent on the same items, for parent-relative objectives.

        Raises:
            EvaluationError: The objective is not defined for these metrics.
        """
        objective = self.objective.with_parents([self._keyed(parent) for parent in parents])
        return objective(self._keyed(metrics))

    def terms_at(
        self, metrics: Mapping[str, TaskMetric], parents: Sequence[Mapping[str, TaskMetric]]
    ) -> tuple[Term, ...]:
        """Return the objective as a weighted sum of metrics, as it is near a model's.

        Args:
            metrics: The model's chosen metrics.
            parents: As for `score_of`.
        """
        objective = self.objective.with_parents([self._keyed(parent) for parent in parents])
        return linearise(objective, self._keyed(metrics))

    def _keyed(self, metrics: Mapping[str, TaskMetric]) -> dict[str, dict[str, TaskMetric]]:
        return {t.name: {t.metric: metrics[t.name]} for t in self.tasks.scored}


@dataclass(frozen=True)
class _Models:
    """The models of a search as far as they can be opened: the base and its layers at least.

    Attributes:
        refs: Every model by name, the base first.
        readers: Those that could be opened.
        layout: Layers of the base.
        out_dtype: Dtype of the merged models.
    """

    refs: Mapping[str, ModelRef]
    readers: Mapping[str, Model]
    layout: Layout
    out_dtype: DtypeName

    @cached_property
    def together(self) -> ModelSet:
        """The models that could be opened, as recipes are bound to them."""
        return ModelSet({str(self.refs[name]): reader for name, reader in self.readers.items()})


def prepare(config: SearchConfig) -> Setup:
    """Resolve a config: open the models, load the tasks, build the space; check that all fits.

    Raises:
        ConfigError: One line for each problem, with file, line and field.
    """
    problems = _Problems()
    method = _find_method(config, problems)
    models = _open_models(config, problems)
    scoring = _load_scoring(config, problems)
    recipes = method and models and _lay_out_recipes(config, method, models, problems)
    if problems.lines or not models or not recipes or not scoring:
        raise problems.as_error(config)
    return _complete(config, models, *recipes, *scoring)


def _find_method(config: SearchConfig, problems: "_Problems") -> Method | None:
    method = problems.catch(("merge", "method"), METHODS.__getitem__, config.merge.method)
    if method is not None:
        problems.lines += parameter_problems(config, method.params)
    return method


def _open_models(config: SearchConfig, problems: "_Problems") -> _Models | None:
    refs = {BASE: config.models.base, **config.models.parents}
    opened = {
        name: problems.catch(_model_field(name), open_model, ref) for name, ref in refs.items()
    }
    readers = {name: reader for name, reader in opened.items() if reader is not None}
    base = opened[BASE]
    if base is None:
        return None
    layout = problems.catch(_model_field(BASE), layout_of, base.names())
    stored = problems.catch(_model_field(BASE), _stored_dtype, base)
    if layout is None or stored is None:
        return None
    return _Models(refs, readers, layout, config.merge.out_dtype or stored)


def _load_scoring(
    config: SearchConfig, problems: "_Problems"
) -> tuple[TaskSuite, Objective] | None:
    tasks = problems.catch(("suite",), load_tasks, config.suite)
    if tasks is None:
        return None
    objective = problems.catch(("objective",), make_objective, config.objective, tasks.scored)
    if objective is None:
        return None
    chunks = len(tasks.chunks("search"))
    mode, means = config.racing.mode, tasks.means
    problems.catch(("racing",), check_racing, mode, chunks, objective.tasks, means)
    return tasks, objective


def _lay_out_recipes(
    config: SearchConfig, method: Method, models: _Models, problems: "_Problems"
) -> tuple[Space, RecipeTemplate] | None:
    """Build what varies between the recipes of a search, and what does not; try both."""
    unfit = setting_problems(config, method, models.out_dtype)
    problems.lines += unfit
    space = problems.catch(("space",), _build_space, config, method, models)
    if space is None:
        return None
    template = make_template(config, method, models.out_dtype)
    problems.catch(("proposer",), _proposer, config, space)
    if len(models.readers) == len(models.refs) and not unfit:
        problems.catch(("models",), _plan_first, space, template, models)
    return space, template


def _complete(
    config: SearchConfig,
    models: _Models,
    space: Space,
    template: RecipeTemplate,
    tasks: TaskSuite,
    objective: Objective,
) -> Setup:
    folders = {name: reader.folder for name, reader in models.readers.items()}
    fingerprints = {name: fingerprint_of(reader) for name, reader in models.readers.items()}
    by_reference = {str(models.refs[name]): found for name, found in fingerprints.items()}
    forms = CanonicalForms(models.together, by_reference)
    return Setup(
        config=config,
        folders=folders,
        fingerprints=fingerprints,
        layout=models.layout,
        out_dtype=models.out_dtype,
        num_bytes=sum(reader.total_bytes for reader in models.readers.values()),
        space=space,
        template=template,
        tasks=tasks,
        objective=objective,
        merge_hash=forms.hash,
        findings=find_dead_knobs(space, template, forms),
        unfit_baselines=unfit_baselines(config, models.out_dtype, models.together),
    )


def _build_space(config: SearchConfig, method: Method, models: _Models) -> Space:
    return build_space(
        config.space,
        config.merge.parameters,
        method.params,
        list(config.models.parents),
        models.layout,
        models.readers[BASE].names(),
    )


def _plan_first(space: Space, template: RecipeTemplate, models: _Models) -> None:
    """Plan the merge where the search begins, which checks that all models go together."""
    models.together.bind(decode(space, Genome(space.initial), template))


def _proposer(config: SearchConfig, space: Space) -> AbstractProposer:
    seed = stream_seed(config.study.seed, "propose") % 2**32
    return make_proposer(config.proposer, space, seed)


class _Problems:
    """Collects the sentences of what is wrong."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def catch(
        self,
        field: tuple[str, ...],
        step: Callable[Inputs, Found],
        *args: Inputs.args,
        **kwargs: Inputs.kwargs,
    ) -> Found | None:
        """Run a step; on an error of the user's, note it under the config's field and go on."""
        try:
            return step(*args, **kwargs)
        except EvoMergeError as error:
            self.lines += [
                line if begins_with_field(line) else f"{dotted(field)}: {line}"
                for line in str(error).splitlines()
            ]
        return None

    def as_error(self, config: SearchConfig) -> ConfigError:
        return place_problems(ConfigError("\n".join(self.lines)), config.origin)


def _model_field(name: str) -> tuple[str, ...]:
    return ("models", "base") if name == BASE else ("models", "parents", name)


def _stored_dtype(base: Model) -> DtypeName:
    return _FLOATS[base.main_dtype]


def make_template(config: SearchConfig, method: Method, out_dtype: DtypeName) -> RecipeTemplate:
    """Return what all recipes of a search have in common."""
    shared = {n: v for n, v in config.merge.parameters.items() if not isinstance(v, dict)}
    own = {n: v for n, v in config.merge.parameters.items() if isinstance(v, dict)}
    parents = tuple(config.models.parents.items())
    base = config.models.base if method.has_deltas(True) else None
    if method.max_parents == 1 and len(parents) == 2:
        base = parents[0][1]  # a path between two parents (slerp): it starts at the first
    merge = config.merge
    draws = method.random_masks or merge.threshold_ties == "hash" or merge.rounding == "dither"
    as_it_is = config.merge.tokenizer is None and config.tokenizer_model == base
    return RecipeTemplate(
        merge_method=config.merge.method,
        base=base,
        parents=parents,
        shared=shared,
        per_model=own,
        out_dtype=out_dtype,
        # None is the recipe's base: its files are then copied as they are
        tokenizer_source=None if as_it_is else str(config.tokenizer_model),
        mask_seed=stream_seed(config.study.seed, "masks") % 2**32 if draws else 0,
        threshold_ties=merge.threshold_ties,
        rounding=merge.rounding,
    )


def setting_problems(config: SearchConfig, method: Method, out_dtype: DtypeName) -> list[str]:
    """Return a line for each setting of the merge that does not fit its method or dtype."""
    whole = "trim_whole_model"
    whole_model = bool(config.merge.parameters.get(whole)) or whole in config.space
    found = {
        "threshold_ties": ties_problem(config.merge.threshold_ties, method, whole_model),
        "rounding": rounding_problem(config.merge.rounding, [getattr(torch, out_dtype)]),
    }
    return [f"merge.{field}: {problem}" for field, problem in found.items() if problem]


def parameter_problems(config: SearchConfig, params: tuple[Param, ...]) -> list[str]:
    """Return a line for each fixed parameter that the method does not take as it is written."""
    known = {param.name: param for param in params}
    problems = []
    for name, value in config.merge.parameters.items():
        field = dotted(("merge", "parameters", name))
        param = known.get(name)
        if param is None:
            problems.append(
                f"{field}: {config.merge.method} has no such parameter.{did_you_mean(name, known)}"
            )
            continue
        if isinstance(value, dict) and not param.per_model:
            problems.append(f"{field}: is shared by all parents. Give one value.")
            continue
        for number in value.values() if isinstance(value, dict) else [value]:
            if isinstance(number, bool) != (param.kind == "bool"):
                wanted = "true or false" if param.kind == "bool" else "a number"
                problems.append(f"{field}: came {number!r}, {wanted} is needed.")
            elif param.kind != "bool" and not param.low <= number <= param.high:
                problems.append(
                    f"{field}: came {number!r}, allowed is {param.low:g} to {param.high:g}."
                )
    return problems
