"""The Optuna study as the only durable truth: our records as Optuna trials, for Optuna's tools too.

A trial is written with all its parameters in one transaction (as WAITING), its result before its
state changes, and nothing is told to the proposer before it is stored. The driver is the only
writer.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from evomerge.config.recipe import Recipe
from evomerge.config.search import StudyConfig, journal_of
from evomerge.errors import StudyError
from evomerge.registry import did_you_mean
from evomerge.space.knobs import Knob
from evomerge.study.records import Ask, KnobValue, State, TrialRecord, TrialResult

ASK, RECIPE, RESULT, BASELINE = (
    f"evomerge.{key}" for key in ("ask", "recipe", "result", "baseline")
)
_OPTUNA_STATES: dict[str, TrialState] = {
    "done": TrialState.COMPLETE,
    "duplicate": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "invalid": TrialState.FAIL,
    "failed": TrialState.FAIL,
}
Answer = TypeVar("Answer")

STALE_LOCK_S = 5.0
"""Age from which a journal's lock file counts as left behind."""

_JOURNAL_BEGINS = b'{"op_code"'


class StudyStorage:
    """One evomerge study inside an Optuna storage.

    Args:
        storage: The opened Optuna storage.
        name: Name of the study.
        where: How messages call the storage.
        create: Make the study when it does not exist; else a missing one is an error.

    Raises:
        StudyError: The storage does not answer, or there is no such study.
    """

    def __init__(self, storage: BaseStorage, name: str, where: str, create: bool) -> None:
        self._storage, self.name, self._where = storage, name, where
        self._id = self._guard(lambda: self._open(create))
        self._trial_ids: dict[int, int] = {}
        for trial in self._frozen():
            self._trial_ids[trial.number] = trial._trial_id

    def attribute(self, key: str) -> Any:
        """Return an attribute of the study, None when it is not set.

        Its name in Optuna is the key with `evomerge.` before it.
        """
        attributes = self._guard(lambda: self._storage.get_study_user_attrs(self._id))
        return attributes.get(f"evomerge.{key}")

    def set_attribute(self, key: str, value: Any) -> None:
        """Set an attribute of the study; the value is plain data."""
        self._guard(lambda: self._storage.set_study_user_attr(self._id, f"evomerge.{key}", value))

    def add_candidate(
        self, ask: Ask, recipe: Recipe, values: Mapping[str, KnobValue], knobs: Sequence[Knob]
    ) -> TrialRecord:
        """Record a candidate that was asked for, as a waiting trial, in one transaction."""
        attributes = {
            ASK: {"seq": ask.seq, "after": ask.after, "genome": list(ask.genome)},
            RECIPE: {"hash": recipe.hash, **recipe.model_dump(mode="json")},
        }
        distributions = {knob.name: distribution_of(knob) for knob in knobs}
        number = self._add(dict(values), distributions, attributes)
        return TrialRecord(number, "waiting", recipe, values, ask, None, None)

    def add_baseline(self, name: str, recipe: Recipe) -> TrialRecord:
        """Record a baseline as a waiting trial without parameters."""
        attributes = {
            BASELINE: name,
            RECIPE: {"hash": recipe.hash, **recipe.model_dump(mode="json")},
        }
        number = self._add({}, {}, attributes)
        return TrialRecord(number, "waiting", recipe, {}, None, name, None)

    def start(self, number: int) -> None:
        """Mark a waiting trial as running."""
        self._set_state(number, TrialState.RUNNING, None)

    def finish(self, number: int, result: TrialResult) -> None:
        """Store what came of a running trial, then close it, unless it is closed already."""
        self._guard(
            lambda: self._storage.set_trial_user_attr(
                self._trial_ids[number], RESULT, result.to_json()
            )
        )
        self.close_recorded(number, result)

    def close_recorded(self, number: int, result: TrialResult) -> None:
        """Close a trial whose result is stored; finishes what a killed driver left half done."""
        values = None if result.fitness is None else [result.fitness]
        self._set_state(number, _OPTUNA_STATES[result.state], values)

    def trials(self) -> list[TrialRecord]:
        """Return all trials by number."""
        return [_record(trial) for trial in self._frozen()]

    def _open(self, create: bool) -> int:
        names = [study.study_name for study in self._storage.get_all_studies()]
        if self.name not in names:
            if not create:
                raise StudyError(
                    f"study {self.name!r}: {self._where} holds no study of this name."
                    f"{did_you_mean(self.name, names)}"
                )
            directions = [optuna.study.StudyDirection.MAXIMIZE]
            self._storage.create_new_study(directions, self.name)
        return self._storage.get_study_id_from_name(self.name)

    def _add(
        self,
        values: dict[str, KnobValue],
        distributions: dict[str, BaseDistribution],
        attributes: dict[str, Any],
    ) -> int:
        template = create_trial(
            state=TrialState.WAITING,
            params=values,
            distributions=distributions,
            user_attrs=attributes,
        )
        trial_id = self._guard(lambda: self._storage.create_new_trial(self._id, template))
        number = self._guard(lambda: self._storage.get_trial_number_from_id(trial_id))
        self._trial_ids[number] = trial_id
        return number

    def _set_state(self, number: int, state: TrialState, values: list[float] | None) -> None:
        trial_id = self._trial_ids[number]
        if self._guard(lambda: self._storage.get_trial(trial_id)).state.is_finished():
            return
        self._guard(lambda: self._storage.set_trial_state_values(trial_id, state, values))

    def _frozen(self) -> list[FrozenTrial]:
        trials = self._guard(lambda: self._storage.get_all_trials(self._id, deepcopy=False))
        return sorted(trials, key=_number)

    def _guard(self, operation: Callable[[], Answer]) -> Answer:
        try:
            return operation()
        except (OSError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise StudyError(
                f"study {self.name!r}: {self._where} cannot be read or written ({reason}). "
                "Finished trials are safe; mend the storage and resume."
            ) from error


def open_storage(config: StudyConfig, create: bool) -> StudyStorage:
    """Open the storage a config names.

    Args:
        config: Name, folder, storage.
        create: Make study and journal when they do not exist.

    Raises:
        StudyError: It cannot be opened, or holds no such study.
    """
    return _open_at(config.name, config.journal or str(config.storage), create)


def open_named(name: str, location: str) -> StudyStorage:
    """Open an existing study by name and storage (a journal file or a SQLAlchemy URL).

    Raises:
        StudyError: There is no such storage or study.
    """
    return _open_at(name, journal_of(location) or location, create=False)


def mend_journal(path: Path) -> None:
    """Cut a torn last line off a journal and remove a lock file left by a killed driver.

    Call it under the study's lock. A line that was being written when the power or the disk went
    away would swallow the next one.
    """
    try:
        _remove_stale_lock(path.with_name(path.name + ".lock"))
        if not path.exists():
            return
        with path.open("rb+") as journal:
            content = journal.read()
            if not content.startswith(_JOURNAL_BEGINS) and content:
                raise StudyError(
                    f"study.storage: {path} is not an Optuna journal. Name another file."
                )
            whole = content.rfind(b"\n") + 1
            if whole != len(content):
                journal.truncate(whole)
    except OSError as error:
        raise StudyError(
            f"study.storage: {path} cannot be written ({error.strerror}). Choose another place."
        ) from None


def _remove_stale_lock(lock: Path) -> None:
    # a living writer holds it for milliseconds
    left = lock.is_symlink() or lock.exists()
    if left and time.time() - lock.lstat().st_mtime > STALE_LOCK_S:
        lock.unlink(missing_ok=True)


def distribution_of(knob: Knob) -> BaseDistribution:
    """Return a knob as an Optuna distribution."""
    if knob.kind == "choice":
        return CategoricalDistribution(knob.choices)
    if knob.kind == "int":
        return IntDistribution(int(knob.low), int(knob.high), log=knob.scale == "log")
    return FloatDistribution(knob.low, knob.high, log=knob.scale == "log")


def _open_at(name: str, place: Path | str, create: bool) -> StudyStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces new studies on stderr
    if isinstance(place, str):
        return StudyStorage(_database(place), name, place, create)
    if not create and not place.exists():
        raise StudyError(f"study {name!r}: there is no journal at {place}. Start it first.")
    return StudyStorage(_journal(place), name, str(place), create)


def _journal(path: Path) -> BaseStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path)))
    except OSError as error:
        raise StudyError(
            f"study.storage: {path} cannot be written ({error.strerror}). Choose another folder."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StudyError(f"study.storage: {path} is not an Optuna journal.") from None


def _database(url: str) -> BaseStorage:
    try:
        return get_storage(url)
    except (SQLAlchemyError, ImportError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())[:200]
        raise StudyError(f"study.storage: {url} cannot be opened ({reason}).") from None


def _number(trial: FrozenTrial) -> int:
    return trial.number


def _record(trial: FrozenTrial) -> TrialRecord:
    attributes = trial.user_attrs
    if RECIPE not in attributes:
        raise StudyError(
            f"trial {trial.number} of this study was not made by evomerge. "
            "Give study.name another name, or study.storage another place."
        )
    ask = attributes.get(ASK)
    result = TrialResult.from_json(attributes[RESULT]) if RESULT in attributes else None
    recipe = {key: value for key, value in attributes[RECIPE].items() if key != "hash"}
    return TrialRecord(
        number=trial.number,
        state=_state(trial, result),
        recipe=Recipe.model_validate_json(json.dumps(recipe)),
        values=trial.params,
        ask=Ask(ask["seq"], ask["after"], tuple(ask["genome"])) if ask else None,
        baseline=attributes.get(BASELINE),
        result=result,
    )


def _state(trial: FrozenTrial, result: TrialResult | None) -> State:
    if trial.state is TrialState.WAITING:
        return "waiting"
    if trial.state is TrialState.RUNNING or result is None:
        return "running"
    return result.state
