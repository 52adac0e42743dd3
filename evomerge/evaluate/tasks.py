"""Tasks: lm-eval's own, loaded and checked without a model; their chunks and their metrics."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval.api.metrics import mean, mean_stderr
from lm_eval.api.task import ConfigurableTask

from evomerge.config.suite import ItemRole, SuiteConfig, TaskConfig
from evomerge.errors import ConfigError, EvaluationError, NonFiniteError
from evomerge.evaluate.catalog import Catalog, quiet
from evomerge.evaluate.evaluator import Chunk, EvalResult, TaskItems, TaskMetric, Value
from evomerge.evaluate.items import Used, deal
from evomerge.evaluate.leakage import Tested, find_leaks
from evomerge.evaluate.paired import pseudo_values
from evomerge.evaluate.roles import RolePart, assign_roles
from evomerge.evaluate.scores import ScoredTask
from evomerge.evaluate.settings import apply_settings
from evomerge.seeds import stream_seed


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite, checked.

    Attributes:
        config: What the suite says of it.
        task: lm-eval's task, reading its own evaluation split.
        metric: Key of the metric that counts, `exact_match,strict-match`.
        higher_is_better: Whether more of it is better.
        roles: Its items by role; roles without items are left out.
    """

    config: TaskConfig
    task: ConfigurableTask
    metric: str
    higher_is_better: bool
    roles: Mapping[ItemRole, RolePart]

    @property
    def name(self) -> str:
        """Name of the task."""
        return self.config.task


class TaskSuite:
    """The checked tasks of a suite. Made by `load_tasks`; the same on every worker."""

    def __init__(
        self, config: SuiteConfig, tasks: Sequence[SuiteTask], leakage: Sequence[str] = ()
    ) -> None:
        self.config = config
        self.tasks = tuple(tasks)
        # a sentence for each leak that the suite allows
        self.leakage = tuple(leakage)

    @property
    def scored(self) -> tuple[ScoredTask, ...]:
        """What an objective needs to know of the tasks, in the order of the suite."""
        return tuple(
            ScoredTask(t.name, t.metric, t.config.weight, t.higher_is_better, t.config.floor or 0.0)
            for t in self.tasks
        )

    def items(self, role: ItemRole) -> dict[str, tuple[int, ...]]:
        """Return the document numbers of a role for each task that has any, ascending."""
        return {t.name: t.roles[role].ids for t in self.tasks if role in t.roles}

    def chunks(self, role: ItemRole) -> tuple[Chunk, ...]:
        """Return the parts of a role's items, each with its share of every task and stratum.

        There are `config.chunks` of them, or as many as there are items when those are fewer; none
        is empty, and a task with fewer items than chunks is in some of them only. Confirm and
        report have none unless every task has items for them.
        """
        if role != "search" and any(role not in t.roles for t in self.tasks):
            return ()
        strata = {t.name: t.roles[role].strata for t in self.tasks if role in t.roles}
        parts = deal(
            strata, self.config.chunks, stream_seed(self.config.items.seed, "chunks", role)
        )
        return tuple(Chunk(role, i, part) for i, part in enumerate(parts))

    def drawn(self, roles: Sequence[ItemRole]) -> dict[str, dict[str, list[int]]]:
        """Return the documents of some roles, by task and split."""
        drawn: dict[str, dict[str, list[int]]] = {}
        for task in self.tasks:
            for part in (task.roles[role] for role in roles if role in task.roles):
                drawn.setdefault(task.name, {}).setdefault(part.split, []).extend(part.ids)
        return drawn

    @property
    def means(self) -> tuple[str, ...]:
        """Names of the tasks whose metric that counts is the mean of its values per item."""
        return tuple(t.name for t in self.tasks if _aggregation(t, t.metric) is mean)

    def with_numbers(self, result: EvalResult) -> EvalResult:
        """Return a result whose metrics that count have a number per item, whose mean they are.

        A metric that is no mean, such as F1 or corpus BLEU, gets jackknife pseudo-values.

        Raises:
            EvaluationError: A metric is not one number over these items.
        """
        numbered = dict(result)
        for task in self.tasks:
            if task.name in result and task.name not in self.means:
                numbered[task.name] = _with_pseudo_values(task, result[task.name])
        return numbered

    def aggregate(self, result: EvalResult) -> dict[str, dict[str, TaskMetric]]:
        """Return every task's metrics over the items of a result, by lm-eval's own aggregation.

        A metric that is not one finite number over these items is left out, unless it is the one
        that counts. The standard error is that of a mean (sample deviation / sqrt(n)); None for
        other aggregations and for a single item.

        Raises:
            NonFiniteError: The metric that counts is NaN or Inf.
            EvaluationError: The metric that counts is not among the results, or is not a number.
        """
        metrics = {}
        for task in self.tasks:
            if task.name in result:
                values = result[task.name].values
                found = {key: _aggregate(task, key, column) for key, column in values.items()}
                metrics[task.name] = {key: metric for key, metric in found.items() if metric}
                if task.metric not in metrics[task.name]:
                    raise EvaluationError(
                        f"task {task.name!r}: no item has a value of {task.metric}. It has "
                        f"{', '.join(metrics[task.name])}."
                    )
        return metrics


def load_tasks(config: SuiteConfig, used: Used | None = None) -> TaskSuite:
    """Load a suite's tasks with their data, put its settings on them, give each role its items.

    Args:
        config: The suite.
        used: Items of earlier confirmations, which no further one gets: as of `TaskSuite.drawn`.
            Where some task has too few others, no task has items of that role.

    Raises:
        ConfigError: One line for each problem, beginning with the dotted field it is about
            (`suite.tasks[1].metric: ...`).
    """
    problems = [
        f"suite.include_path[{i}]: {folder!r} is not a folder. Give the folder that holds the task "
        "YAML files."
        for i, folder in enumerate(config.include_path)
        if not Path(folder).is_dir()
    ]
    with quiet():
        catalog = Catalog([folder for folder in config.include_path if Path(folder).is_dir()])
        loaded = [
            _load_task(f"suite.tasks[{i}]", entry, config, catalog, problems, used or {})
            for i, entry in enumerate(config.tasks)
        ]
    leaks = find_leaks([_items_of(i, task) for i, task in enumerate(loaded) if task is not None])
    if config.leakage == "refuse":
        problems += [leak.refusal for leak in leaks]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    tasks = [task for task in loaded if task is not None]
    return TaskSuite(config, tasks, [f"{leak.what}." for leak in leaks])


def _items_of(i: int, task: SuiteTask) -> Tested:
    settings = task.task.config
    return Tested(
        where=f"suite.tasks[{i}]",
        name=task.name,
        data=settings.dataset_path or "",
        own_split=settings.test_split or settings.validation_split,
        splits=list(task.task.dataset),
        roles=dict(task.roles),
    )


def _load_task(
    where: str,
    entry: TaskConfig,
    config: SuiteConfig,
    catalog: Catalog,
    problems: list[str],
    used: Used,
) -> SuiteTask | None:
    try:
        task = catalog.load(entry.task)
    except ConfigError as error:
        problems.append(f"{where}: {error}")
        if str(error).startswith("no task"):
            problems.extend(f"suite.include_path: {sentence}" for sentence in catalog.unreadable())
        return None
    if config.chat.enable_thinking and task.OUTPUT_TYPE != "generate_until":
        problems.append(
            f"suite.chat.enable_thinking: task {entry.task!r} compares log-likelihoods, which "
            "leave no room to think. Leave the task or the switch out."
        )
    problems.extend(f"{where}.{problem}" for problem in apply_settings(task, entry))
    metric = _metric_key(where, entry, task, problems)
    higher = entry.higher_is_better
    if higher is None and metric is not None:
        higher = task.higher_is_better().get(metric.partition(",")[0])
        if higher is None:
            problems.append(
                f"{where}.higher_is_better: lm-eval does not know whether more {metric} is better. "
                "Set it to true or false."
            )
    roles = assign_roles(where, entry, task, config, catalog, problems, used.get(entry.task, {}))
    return SuiteTask(entry, task, metric or "", bool(higher), roles)


def metric_keys(task: ConfigurableTask) -> list[str]:
    """Return the metric keys that a task's file announces: each metric with each filter."""
    filters = [f["name"] for f in task.config.filter_list or [{"name": "none"}]]
    return [f"{metric},{name}" for metric in task.aggregation() for name in filters]


def _metric_key(
    where: str, entry: TaskConfig, task: ConfigurableTask, problems: list[str]
) -> str | None:
    keys = metric_keys(task)
    matches = [key for key in keys if entry.metric in (key, key.partition(",")[0])]
    if len(matches) == 1:
        return matches[0]
    what = f"{where}.metric: task {entry.task!r}"
    if matches:
        problems.append(
            f"{what} has {entry.metric} more than once: {', '.join(matches)}. Write which."
        )
    else:
        problems.append(f"{what} has no metric {entry.metric!r}. It has {', '.join(keys)}.")
    return None


def _aggregate(task: SuiteTask, key: str, column: Sequence[Value]) -> TaskMetric | None:
    function = _aggregation(task, key)
    values: list[Any] = [value for value in column if value is not None]
    if not values:
        return None
    try:
        value = float(function(values))
    except OverflowError:
        value = math.inf
    except (TypeError, ValueError, ZeroDivisionError) as error:
        if key == task.metric:
            raise EvaluationError(
                f"task {task.name!r}: {key} is not one number over these items ({error})."
            ) from None
        return None
    if not math.isfinite(value):
        if key == task.metric:
            raise NonFiniteError(f"task {task.name!r}: {key} is {value} over {len(values)} items.")
        return None
    closed = function is mean and len(values) > 1
    return TaskMetric(value, float(mean_stderr(values)) if closed else None, len(values))


def _aggregation(task: SuiteTask, key: str) -> Callable[[list[Any]], float]:
    function: Callable[[list[Any]], float] = task.task.aggregation().get(
        key.rpartition(",")[0], mean
    )
    return function


def _with_pseudo_values(task: SuiteTask, items: TaskItems) -> TaskItems:
    column = items.values[task.metric]
    known = [i for i, value in enumerate(column) if value is not None]
    if len(known) < 2:
        return items

    def measure(values: Sequence[Value]) -> float:
        found = _aggregate(task, task.metric, values)
        assert found is not None, "the metric that counts is a number or an error"
        return found.value

    numbers = pseudo_values([column[i] for i in known], measure)
    replaced: list[Value] = [None] * len(column)
    for i, number in zip(known, numbers, strict=True):
        replaced[i] = number
    return replace(items, values={**items.values, task.metric: tuple(replaced)})
