"""Scores: task metrics become the one objective, with its standard error. Higher is better."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from evomerge.config.objective import ObjectiveConfig
from evomerge.errors import ConfigError, EvaluationError, NonFiniteError
from evomerge.evaluate.evaluator import TaskMetric

Metrics = Mapping[str, Mapping[str, TaskMetric]]
"""Task name → lm-eval's metric key (`acc,none`) → the metric over some items."""


@dataclass(frozen=True)
class ScoredTask:
    """What an objective knows of a task.

    Attributes:
        name: The task.
        metric: Key of the metric that counts.
        weight: Share in a weighted mean; a task of weight 0 does not count.
        higher_is_better: Whether more of the metric is better.
        floor: Score of a guess.
    """

    name: str
    metric: str
    weight: float = 1.0
    higher_is_better: bool = True
    floor: float = 0.0


@dataclass(frozen=True)
class Score:
    """The value of an objective and its standard error, None where that has no closed form."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Objective:
    """A function from task metrics to one score.

    Made by `make_objective`, which checks that it makes sense for the tasks. Parent-relative
    objectives also need `with_parents` before they can be asked.

    Attributes:
        config: Kind of mean and kind of scores.
        tasks: The tasks that count.
        best_parent: For parent-relative scores, the best parent's metric on each task.
    """

    config: ObjectiveConfig
    tasks: tuple[ScoredTask, ...]
    best_parent: Mapping[str, float] = field(default_factory=dict)

    def with_parents(self, parents: Sequence[Metrics]) -> "Objective":
        """Return the objective that measures against these parents; itself where it does not.

        Args:
            parents: Metrics of each parent, on the same items as candidates.

        Raises:
            EvaluationError: No parent is above 0 on some task, so nothing is relative to it.
        """
        if self.config.scores != "parent_relative":
            return self
        best = {}
        for task in self.tasks:
            best[task.name] = max((_metric(p, task).value for p in parents), default=0.0)
            if best[task.name] <= 0:
                raise EvaluationError(
                    f"objective.scores: the best parent has {best[task.name]:g} on task "
                    f"{task.name!r}; parent_relative needs a parent above 0 there. Use raw or "
                    "floor_normalised scores, or another metric."
                )
        return replace(self, best_parent=best)

    def __call__(self, metrics: Metrics) -> Score:
        """Return the objective of a model, from its metrics on every task that counts.

        Raises:
            EvaluationError: A metric is missing, or scores below 0 have no geometric mean.
            NonFiniteError: A metric is NaN or Inf.
        """
        scores = [self._score(task, _metric(metrics, task)) for task in self.tasks]
        if self.config.kind == "worst_task":
            return Score(min(score.value for score in scores), None)
        if self.config.kind == "geometric_mean":
            return Score(self._geometric_mean([score.value for score in scores]), None)
        total = math.fsum(task.weight for task in self.tasks)
        shares = [task.weight / total for task in self.tasks]
        value = math.fsum(w * score.value for w, score in zip(shares, scores, strict=True))
        return Score(value, _weighted_stderr(shares, scores))

    def _score(self, task: ScoredTask, metric: TaskMetric) -> Score:
        """Return a task's metric as it enters the mean; floor and parent count as exact."""
        if self.config.scores == "raw":
            shift, scale = 0.0, 1.0 if task.higher_is_better else -1.0
        elif self.config.scores == "floor_normalised":
            shift, scale = task.floor, 1.0 / (1.0 - task.floor)
        else:
            assert task.name in self.best_parent, (
                "a parent-relative objective was asked before with_parents"
            )
            shift, scale = 0.0, 1.0 / self.best_parent[task.name]
        stderr = None if metric.stderr is None else abs(scale) * metric.stderr
        return Score((metric.value - shift) * scale, stderr)

    def _geometric_mean(self, scores: Sequence[float]) -> float:
        if self.config.scores == "floor_normalised":
            # worse than a guess is no better than a guess
            scores = [max(score, 0.0) for score in scores]
        for task, score in zip(self.tasks, scores, strict=True):
            if score < 0:
                raise EvaluationError(
                    f"objective.kind: task {task.name!r} has {task.metric} {score:g}; a geometric "
                    "mean needs scores of 0 or more. Use weighted_mean or worst_task."
                )
        if min(scores) == 0:
            return 0.0
        total = math.fsum(task.weight for task in self.tasks)
        logs = (t.weight * math.log(s) for t, s in zip(self.tasks, scores, strict=True))
        return math.exp(math.fsum(logs) / total)


def make_objective(config: ObjectiveConfig, tasks: Iterable[ScoredTask]) -> Objective:
    """Make the objective of a suite.

    Raises:
        ConfigError: One line for each task that these scores or this mean cannot take.
    """
    counted = tuple(task for task in tasks if task.weight > 0)
    problems = [problem for task in counted if (problem := _misfit(config, task))]
    if problems:
        raise ConfigError("\n".join(problems))
    return Objective(config, counted)


def _misfit(config: ObjectiveConfig, task: ScoredTask) -> str | None:
    what = f"lower {task.metric} is better on task {task.name!r}"
    if not task.higher_is_better and config.scores != "raw":
        return (
            f"objective.scores: {what}; {config.scores} needs metrics where higher is better. Use "
            "raw."
        )
    if not task.higher_is_better and config.kind == "geometric_mean":
        return (
            f"objective.kind: {what}, so its scores are negative and have no geometric mean. Use "
            "weighted_mean."
        )
    if config.scores == "floor_normalised" and task.floor >= 1:
        return (
            f"objective.scores: task {task.name!r} has floor {task.floor:g}; floor_normalised "
            "needs a floor below 1."
        )
    return None


def _metric(metrics: Metrics, task: ScoredTask) -> TaskMetric:
    metric = metrics.get(task.name, {}).get(task.metric)
    if metric is None:
        raise EvaluationError(
            f"task {task.name!r}: no {task.metric} was measured. Score it on some items first."
        )
    if not math.isfinite(metric.value):
        raise NonFiniteError(
            f"task {task.name!r}: {task.metric} is {metric.value}. Such a model has no score."
        )
    return metric


def _weighted_stderr(shares: Sequence[float], scores: Sequence[Score]) -> float | None:
    """Standard error of a weighted sum of scores of independent tasks."""
    errors = [score.stderr for score in scores]
    if any(error is None for error in errors):
        return None
    return math.sqrt(math.fsum((w * e) ** 2 for w, e in zip(shares, errors, strict=True) if e))
