"""What an evaluation is asked and what it answers: chunks of items in, results per item out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from evomerge.config.suite import ItemRole

Value = float | int | bool | str | None | list["Value"] | dict[str, "Value"]
"""What a metric says of one item: mostly a number; a pair or a mapping where it is not a mean."""


@dataclass(frozen=True)
class Chunk:
    """A fixed list of items that is scored in one go; the same for every candidate.

    Attributes:
        role: What the items are for; decides the data split they are numbered in.
        index: Position among the chunks of its role.
        items: For each task, the document numbers, ascending.
    """

    role: ItemRole
    index: int
    items: Mapping[str, tuple[int, ...]]

    @property
    def num_items(self) -> int:
        """Number of items over all tasks."""
        return sum(len(ids) for ids in self.items.values())


@dataclass(frozen=True)
class TaskItems:
    """Results per item of one task.

    Attributes:
        ids: Document numbers, ascending.
        values: For each of lm-eval's metric keys (`acc,none`), the item's value, in the order of
            `ids`; None where the task gave none, or none that is finite.
        answers: What the model did, by column, in the order of `ids` (`evaluate/answers.py` lists
            the columns); None where an item has no such thing. Studies of earlier versions have no
            columns.
    """

    ids: tuple[int, ...]
    values: Mapping[str, tuple[Value, ...]]
    answers: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)


EvalResult = Mapping[str, TaskItems]
"""Task name → results per item."""


@dataclass(frozen=True)
class TaskMetric:
    """A task's metric over some items; its standard error is None where it has no closed form."""

    value: float
    stderr: float | None
    num_items: int


@dataclass(frozen=True)
class SuiteFacts:
    """What a prepared suite says of itself; equal on every worker of a study.

    Attributes:
        digest: SHA-256 of everything that decides the numbers of the search: prompts, tokens,
            targets, items, settings, versions of the tasks.
        unseen: SHA-256 of the confirm and report items, which a study may change.
        num_items: For each role, the items of each task.
    """

    digest: str
    unseen: str = ""
    num_items: Mapping[ItemRole, Mapping[str, int]] = field(default_factory=dict)


class AbstractEvaluator(ABC):
    """Scores the live model on chunks of a suite. Prepared once, then asked for every candidate."""

    @abstractmethod
    def facts(self) -> SuiteFacts:
        """Return what identifies the prepared suite."""

    @abstractmethod
    def chunks(self, role: ItemRole) -> tuple[Chunk, ...]:
        """Return the chunks of a role, in order; together they hold each of its items once."""

    @abstractmethod
    def score(self, model: torch.nn.Module, chunk: Chunk) -> EvalResult:
        """Score a model on a chunk.

        The same weights give the same results, bit for bit, whatever was scored before. The model
        is not modified.

        Raises:
            NonFiniteError: NaN or Inf among the log-likelihoods or logits.
            EvaluationError: It takes longer than the suite allows, or does not fit into memory.
        """


def join_results(parts: list[EvalResult]) -> EvalResult:
    """Join results of several chunks, in any order; items are ascending by document number.

    A metric or column that one part has and another has not is None for the items of the latter.
    """
    joined: dict[str, TaskItems] = {}
    for task in sorted({task for part in parts for task in part}):
        pieces = [part[task] for part in parts if task in part]
        sizes = [len(piece.ids) for piece in pieces]
        ids = [i for piece in pieces for i in piece.ids]
        order = sorted(range(len(ids)), key=ids.__getitem__)
        joined[task] = TaskItems(
            tuple(ids[i] for i in order),
            _join_columns([piece.values for piece in pieces], sizes, order),
            _join_columns([piece.answers for piece in pieces], sizes, order),
        )
    return joined


def _join_columns(
    pieces: Sequence[Mapping[str, tuple[Value, ...]]], sizes: Sequence[int], order: Sequence[int]
) -> dict[str, tuple[Value, ...]]:
    joined = {}
    for key in sorted({key for piece in pieces for key in piece}):
        missing = [(None,) * size for size in sizes]
        columns = (piece.get(key, none) for piece, none in zip(pieces, missing, strict=True))
        column = [value for values in columns for value in values]
        joined[key] = tuple(column[i] for i in order)
    return joined
