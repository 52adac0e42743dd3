"""Results per item as a pandas frame: one row for each item, one column for each thing known."""

from collections.abc import Iterable, Mapping

import pandas as pd

from evomerge.evaluate.evaluator import TaskItems, Value

KEYS = ("trial", "role", "task", "item")


def item_frame(results: Iterable[tuple[tuple[int, str, str], TaskItems]]) -> pd.DataFrame:
    """Return the results as a frame, sorted by its first four columns.

    Numbers, flags and texts have pandas' types with missing values; columns of lists hold objects.

    Args:
        results: Trial, role and task, each with its results per item.
    """
    keys: list[tuple[int, str, str, int]] = []
    metrics: dict[str, list[Value]] = {}
    answers: dict[str, list[Value]] = {}
    for place, items in results:
        _extend(metrics, items.values, len(keys))
        _extend(answers, items.answers, len(keys))
        keys += [(*place, i) for i in items.ids]
    columns = {
        name: _column(values + [None] * (len(keys) - len(values)))
        for name, values in [*sorted(metrics.items()), *sorted(answers.items())]
    }
    frame = pd.DataFrame(keys, columns=list(KEYS)).assign(**columns)
    return frame.sort_values(list(KEYS), ignore_index=True)


def _extend(
    columns: dict[str, list[Value]], more: Mapping[str, tuple[Value, ...]], num_rows: int
) -> None:
    """Append values to columns that may be new or may have missed some of the rows so far."""
    for name, values in more.items():
        column = columns.setdefault(name, [])
        column += [None] * (num_rows - len(column))
        column += values


def _column(values: list[Value]) -> "pd.api.extensions.ExtensionArray | pd.Series[object]":
    if any(isinstance(value, (list, dict)) for value in values):
        return pd.Series(values, dtype=object)
    return pd.array(values)
