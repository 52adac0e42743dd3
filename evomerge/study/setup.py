"""Setup: a search config resolved against the real models and tasks; everything that is wrong with it, at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.fingerprint import fingerprint
from evomerge.checkpoints.locate import locate
from evomerge.checkpoints.reader import LazyCheckpoint, open_checkpoint
from evomerge.config.layout import Layout
from evomerge.config.models import DtypeName, ModelRef
from evomerge.config.params import Param
from evomerge.config.search import BASE, SearchConfig, begins_with_field, place_problems
from evomerge.config.strict import dotted
from evomerge.errors import ConfigError, EvoMergeError, MergeError
from evomerge.evaluate.evaluator import EvalResult, TaskMetric
from evomerge.evaluate.scores import Objective, Score, make_objective
from evomerge.evaluate.tasks import TaskSuite, load_tasks
from evomerge.merge.plan import make_plan
from evomerge.methods import METHODS
from evomerge.methods.method import Method
from evomerge.propose import make_proposer
from evomerge.propose.proposer import AbstractProposer
from evomerge.registry import did_you_mean
from evomerge.seeds import stream_seed
from evomerge.space.decode import RecipeTemplate, decode
from evomerge.space.genome import Genome
from evomerge.space.space import Space, build_space

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

    def _keyed(self, metrics: Mapping[str, TaskMetric]) -> dict[str, dict[str, TaskMetric]]:
        return {t.name: {t.metric: metrics[t.name]} for t in self.tasks.scored}


def prepare(config: SearchConfig) -> Setup:
    """Resolve a config: open the models, load the tasks, build the space, check that they fit together.

    Raises:
        ConfigError: One line for each problem, with file, line and field.
    """
    problems = _Problems()
    method = problems.catch(("merge", "method"), lambda: METHODS[config.merge.method])
    if method is not None:
        for problem in _parameter_problems(config, method.params):
            problems.lines.append(problem)
    models = {BASE: config.models.base, **config.models.parents}
    checkpoints = {
        name: problems.catch(_model_field(name), lambda ref=ref: _open(ref))
        for name, ref in models.items()
    }
    tasks = problems.catch(("suite",), lambda: load_tasks(config.suite))
    objective = tasks and problems.catch(
        ("objective",), lambda: make_objective(config.objective, tasks.scored)
    )
    base = checkpoints[BASE]
    layout = problems.catch(("models", "base"), lambda: layout_of(base.names())) if base else None
    if method is None or base is None or layout is None:
        raise problems.as_error(config)
    out_dtype = config.merge.out_dtype or _dtype_name(base)
    template = _template(config, method, out_dtype)
    space = problems.catch(
        ("space",),
        lambda: build_space(
            config.space,
            config.merge.parameters,
            method.params,
            list(config.models.parents),
            layout,
            base.names(),
        ),
    )
    if space is not None:
        problems.catch(("proposer",), lambda: _proposer(config, space))
    opened = {name: reader for name, reader in checkpoints.items() if reader is not None}
    if space is not None and len(opened) == len(models):
        recipe = decode(space, Genome(space.initial), template)
        sources = {str(models[name]): reader for name, reader in opened.items()}
        problems.catch(("models",), lambda: make_plan(recipe, sources, layout))
    if problems.lines or tasks is None or objective is None or space is None:
        raise problems.as_error(config)
    folders = {name: locate(ref) for name, ref in models.items()}
    return Setup(
        config=config,
        folders=folders,
        fingerprints={name: fingerprint(folder) for name, folder in folders.items()},
        layout=layout,
        out_dtype=out_dtype,
        num_bytes=sum(reader.total_bytes for reader in opened.values()),
        space=space,
        template=template,
        tasks=tasks,
        objective=objective,
    )


def _proposer(config: SearchConfig, space: Space) -> AbstractProposer:
    seed = stream_seed(config.study.seed, "propose") % 2**32
    return make_proposer(config.proposer, space, seed)


class _Problems:
    """Collects the sentences of what is wrong."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def catch(self, field: tuple[str, ...], step: Callable[[], Found]) -> Found | None:
        """Run a step; on an error of the user's, note it under the config's field and go on."""
        try:
            return step()
        except EvoMergeError as error:
            self.lines += [
                line if begins_with_field(line) else f"{dotted(field)}: {line}"
                for line in str(error).splitlines()
            ]
        return None

    def as_error(self, config: SearchConfig) -> ConfigError:
        return place_problems(ConfigError("\n".join(self.lines)), config.origin)


def _open(ref: ModelRef) -> LazyCheckpoint:
    return open_checkpoint(locate(ref), str(ref))


def _model_field(name: str) -> tuple[str, ...]:
    return ("models", "base") if name == BASE else ("models", "parents", name)


def _dtype_name(base: LazyCheckpoint) -> DtypeName:
    name = str(base.main_dtype).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise MergeError(
            f"{base.label}: is stored in {name}. Set merge.out_dtype to float32 or bfloat16."
        )
    return name  # type: ignore[return-value]


def _template(config: SearchConfig, method: Method, out_dtype: DtypeName) -> RecipeTemplate:
    shared = {n: v for n, v in config.merge.parameters.items() if not isinstance(v, dict)}
    own = {n: v for n, v in config.merge.parameters.items() if isinstance(v, dict)}
    parents = tuple(config.models.parents.items())
    base = config.models.base if method.needs_base else None
    if method.max_parents == 1 and len(parents) == 2:
        base = parents[0][1]  # a path between two parents (slerp): it starts at the first
    mask_seed = stream_seed(config.study.seed, "masks") % 2**32
    return RecipeTemplate(
        merge_method=config.merge.method,
        base=base,
        parents=parents,
        shared=shared,
        per_model=own,
        out_dtype=out_dtype,
        tokenizer_source=str(config.tokenizer_model),
        mask_seed=mask_seed if method.random_masks else 0,
    )


def _parameter_problems(config: SearchConfig, params: tuple[Param, ...]) -> list[str]:
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
