"""StudyView: a study for reading, as pandas frames of trials, items, baselines. Writes nothing."""

from pathlib import Path
from typing import Any

import pandas as pd

from evomerge.config.search import SearchConfig
from evomerge.config.suite import ROLES, ItemRole
from evomerge.errors import StudyError
from evomerge.evaluate.evaluator import EvalResult, join_results
from evomerge.evaluate.flags import FLAGS
from evomerge.study.confirmation import Confirmation
from evomerge.study.item_frame import item_frame
from evomerge.study.ledger import Ledger
from evomerge.study.lock import is_locked
from evomerge.study.records import TrialRecord
from evomerge.study.run import confirmations_of, find_config, item_store
from evomerge.study.storage import open_storage
from evomerge.study.summary import summarise

_FIXED_COLUMNS = ("trial", "state", "baseline", "objective", "stderr", "recipe_hash")


class StudyView:
    """A study as it stands in its storage.

    Args:
        config: The search config; only its study section is used to find the study.

    Raises:
        StudyError: There is no such study.
    """

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        self._storage = open_storage(config.study, create=False)
        spec = self._storage.attribute("spec")
        if spec is None:
            raise StudyError(
                f"study {config.study.name!r} has not begun. Start it with evomerge search."
            )
        self.ledger = Ledger(self._storage.trials())
        self._items = item_store(config, spec)

    @property
    def name(self) -> str:
        """The study's name."""
        return self._storage.name

    @property
    def summary(self) -> dict[str, Any]:
        """Where the study stands, as plain data (as `evomerge status --json`)."""
        notes = self._storage.attribute("notes")
        return summarise(self.name, self._state(), self.ledger, self.confirmations, notes)

    @property
    def confirmations(self) -> tuple[Confirmation, ...]:
        """The study's confirmations, each on items of its own."""
        return confirmations_of(self._storage)

    @property
    def winner(self) -> TrialRecord:
        """What the last confirmation chose; before the first, `best`."""
        confirmed = self.confirmations
        return self.ledger[confirmed[-1].trial] if confirmed else self.best

    @property
    def trials(self) -> pd.DataFrame:
        """One row per trial.

        Its number, state, baseline, objective, a column per task and per knob, cost, worker, error.
        Before the first trial only the columns that no result is needed for.
        """
        rows = [_row(record) for record in self.ledger.records]
        return pd.DataFrame(rows, columns=None if rows else _FIXED_COLUMNS).set_index("trial")

    @property
    def baselines(self) -> pd.DataFrame:
        """The rows of `trials` that are baselines, by name."""
        frame = self.trials
        return frame[frame["baseline"].notna()].set_index("baseline")

    @property
    def best(self) -> TrialRecord:
        """The candidate with the highest objective.

        Raises:
            StudyError: No candidate was scored yet.
        """
        if self.ledger.best is None:
            raise StudyError(
                f"study {self.name!r}: no candidate has been scored yet. Wait, or resume it."
            )
        return self.ledger.best

    def trial(self, number: int) -> TrialRecord:
        """Return a trial by number.

        Raises:
            StudyError: There is none.
        """
        numbers = [record.number for record in self.ledger.records]
        if not numbers:
            raise StudyError(f"study {self.name!r}: there is no trial yet. Wait, or resume it.")
        if number not in numbers:
            raise StudyError(
                f"study {self.name!r}: there is no trial {number}; it has 0 to {max(numbers)}."
            )
        return self.ledger[number]

    def items(self, role: ItemRole | None = "search") -> pd.DataFrame:
        """Return results per item: one row for each trial, role, task and item.

        Columns are `trial`, `role`, `task`, `item`, then the metrics by lm-eval's keys
        (`acc,none`), then what the model did (`loglikelihoods`, `chosen`, `length`, `truncated`, …:
        `evaluate/answers.py` lists them). What a task does not have, and what earlier versions did
        not store, is missing (`pd.NA`, None in columns of lists). A recipe's items stand under the
        first trial that has it, and once.

        Args:
            role: Of the items; None for all.
        """
        first_trials = {r.recipe.hash: r.number for r in reversed(self.ledger.records)}
        return item_frame(
            ((trial, name, task), items)
            for recipe, trial in first_trials.items()
            for name in (ROLES if role is None else (role,))
            for turn in range(1, 2 if name == "search" else len(self.confirmations) + 2)
            for task, items in self._result(recipe, name, turn).items()
        )

    def rates(self, role: ItemRole | None = "search") -> pd.DataFrame:
        """Return how often answers were cut off, empty or unreadable.

        One row for each trial, role and task, with the share of its items for each flag: `empty`,
        `truncated`, `prompt_truncated`, and `extraction_failed` by filter.

        Args:
            role: Of the items; None for all.
        """
        items = self.items(role)
        flags = [name for name in items.columns if name.partition(",")[0] in FLAGS]
        return items.groupby(["trial", "role", "task"])[flags].mean()

    def _result(self, recipe_hash: str, role: ItemRole, turn: int) -> EvalResult:
        """Return what is stored of a recipe, chunks joined."""
        chunks = self._items.read(recipe_hash, role, turn).values()
        return join_results([chunk.result for chunk in chunks])

    def _state(self) -> str:
        state = self._storage.attribute("state") or "running"
        return (
            "stopped"
            if state == "running" and not is_locked(Path(self.config.study.folder))
            else state
        )


def load_study(study: str | Path, storage: str | None = None) -> StudyView:
    """Open a study for reading.

    Args:
        study: A search config (YAML file), or the study's name when `storage` is given.
        storage: Journal file or SQLAlchemy URL.

    Raises:
        ConfigError: The config cannot be read.
        StudyError: There is no such study.
    """
    return StudyView(find_config(str(study), storage))


def _row(record: TrialRecord) -> dict[str, Any]:
    result = record.result
    row: dict[str, Any] = {
        "trial": record.number,
        "state": record.state,
        "baseline": record.baseline,
        "objective": result.fitness if result else None,
        "stderr": result.stderr if result else None,
    }
    if result is not None:
        row |= {f"task.{task}": score.value for task, score in result.tasks.items()}
    row |= {f"knob.{name}": value for name, value in record.values.items()}
    row["recipe_hash"] = record.recipe.hash
    if result is not None:
        fields = ("examples", "seconds_merge", "seconds_score", "worker", "kernels", "attempt")
        row |= {
            name: getattr(result, name) for name in (*fields, "duplicate_of", "digest", "error")
        }
    return row
