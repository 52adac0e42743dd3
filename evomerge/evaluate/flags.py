"""Flags: the answers that are none, as a verdict compares them and as rates of a task."""

from collections.abc import Iterable

from evomerge.evaluate.evaluator import EvalResult, TaskItems
from evomerge.evaluate.scores import ScoredTask

TRUNCATED = "truncated"
EMPTY = "empty"
EXTRACTION_FAILED = "extraction_failed"
PROMPT_TRUNCATED = "prompt_truncated"

FLAGS = (EMPTY, TRUNCATED, EXTRACTION_FAILED, PROMPT_TRUNCATED)
"""Names of the columns of flags; `extraction_failed` is followed by the filter."""


def flags_of(result: EvalResult, tasks: Iterable[ScoredTask]) -> dict[str, tuple[bool, ...]]:
    """Return the items whose answers were cut off, are empty, or hold nothing that counts.

    Only tasks that are answered in words have such flags. An answer counts as extracted if the
    filter of the task's metric found it; other filters of the task do not matter.

    Args:
        result: Results per item.
        tasks: Those to look at, each with the metric that counts; a verdict looks at those of its
            objective.

    Returns:
        For `truncated`, `empty` and `extraction failed`, the items of all such tasks one after
        another, ascending within each: two models on the same items have the same order. Nothing
        where no task is answered in words.
    """
    flags: dict[str, list[bool]] = {}
    for task in tasks:
        for flag, column in _columns(result[task.name], task.metric).items():
            flags.setdefault(flag, []).extend(column)
    return {flag: tuple(column) for flag, column in flags.items()}


def rates_of(result: EvalResult, tasks: Iterable[ScoredTask]) -> dict[str, dict[str, float]]:
    """Return how often each flag of `flags_of` is set: task name → flag → share of its items.

    Tasks without such flags are left out.
    """
    flags = {task.name: _columns(result[task.name], task.metric) for task in tasks}
    return {
        name: {flag: sum(column) / len(column) for flag, column in columns.items()}
        for name, columns in flags.items()
        if columns
    }


def _columns(items: TaskItems, metric: str) -> dict[str, list[bool]]:
    filtered = f"{EXTRACTION_FAILED},{metric.partition(',')[2]}"
    named = {TRUNCATED: TRUNCATED, EMPTY: EMPTY, filtered: "extraction failed"}
    return {
        flag: [bool(value) for value in items.answers[column]]
        for column, flag in named.items()
        if column in items.answers
    }
