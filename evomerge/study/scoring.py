"""Scoring: trials in, results out. Jobs go to workers, chunks that come back are stored, races end.

Which trials there are, and what is recorded of them, is the driver's.
"""

import logging
from dataclasses import replace

from evomerge.config.suite import ItemRole
from evomerge.evaluate.evaluator import Chunk
from evomerge.study.items import ItemStore, ScoredChunk
from evomerge.study.ledger import Ledger
from evomerge.study.races import Races
from evomerge.study.records import TrialRecord
from evomerge.study.results import Metrics
from evomerge.study.schedule import Schedule, Scored
from evomerge.study.setup import Setup
from evomerge.study.storage import StudyStorage
from evomerge.workers.job import Outcome
from evomerge.workers.logs import about_trial
from evomerge.workers.pool import AbstractPool

log = logging.getLogger(__name__)

POLL_S = 0.5
"""Longest wait for an outcome before the driver looks for an interruption and for new workers."""


class Scoring:
    """The trials that are being scored.

    Args:
        setup: The search.
        ledger: All trials; kept up to date by driver and scoring alike.
        storage: The study.
        items: Results per item.
        pool: Workers.
        turn: Number of the next confirmation, from 1.
    """

    def __init__(
        self,
        setup: Setup,
        ledger: Ledger,
        storage: StudyStorage,
        items: ItemStore,
        pool: AbstractPool,
        turn: int,
    ) -> None:
        self._setup, self._ledger, self._storage = setup, ledger, storage
        self._items, self._pool, self._turn = items, pool, turn
        self._schedule = Schedule()
        self._over: dict[int, Scored] = {}
        self._races = Races(setup, items)

    def add(self, record: TrialRecord, role: ItemRole) -> None:
        """Have a trial scored on the items of a role, less what is known already."""
        if role == "search":
            for stopped in self._ledger.stopped_before(record):
                self._items.copy(stopped.recipe.hash, record.recipe.hash, role)
        chunks = self._setup.tasks.chunks(role)
        stored = self._items.read(record.recipe.hash, role, self._turn_of(role))
        known = {c.index: stored[c.index] for c in chunks if _is_of(stored.get(c.index), c)}
        races = bool(self._races) and role == "search" and record.ask is not None
        self._schedule.add(record.number, record.recipe, chunks, known, races)
        if races:
            self._look(record)

    def advance(self) -> None:
        """Hand out jobs, and take in what has come back within `POLL_S`."""
        for worker in self._pool.idle():
            job = self._schedule.next_job(worker)
            if job is None:
                break
            if self._ledger[job.trial].state == "waiting":
                self._storage.start(job.trial)
                self._ledger.put(replace(self._ledger[job.trial], state="running"))
            self._pool.submit(worker, job)
        for outcome in self._pool.collect(POLL_S):
            self._take_in(outcome)
        for trial in self._schedule.over():
            self._over[trial] = self._schedule.take(trial)

    def is_over(self, record: TrialRecord) -> bool:
        """Whether all has come back of a trial, and of what it is judged beside."""
        scored = self._over.get(record.number)
        if scored is not None and scored.state == "stopped":
            return self._races.can_tell(record, self._over, self._ledger)
        return scored is not None

    def metrics_of(self, record: TrialRecord) -> Metrics | None:
        """Return the metrics of a trial that is over and not taken yet; None if it failed."""
        result = self._over[record.number].result
        return None if result is None else self._setup.metrics_of(result)

    def take(self, record: TrialRecord) -> Scored:
        """Return, once, what came of a trial that is over."""
        return self._over.pop(record.number)

    def told(self, record: TrialRecord, scored: Scored) -> float:
        """Return the objective that a stopped candidate is told with."""
        assert scored.result is not None, "what was stopped was scored on some items"
        return self._races.told(record, scored.result, self._ledger)

    def _turn_of(self, role: ItemRole) -> int:
        return 1 if role == "search" else self._turn

    def _take_in(self, outcome: Outcome) -> None:
        with about_trial(outcome.job.trial):
            if outcome.kind != "done":
                log.warning("%s on worker %s: %s", outcome.kind, outcome.worker, outcome.error)
            chunk = self._schedule.settle(outcome)
            if chunk is not None:
                role = outcome.job.chunk.role
                self._items.add(outcome.job.recipe.hash, role, chunk, self._turn_of(role))
                record = self._ledger[outcome.job.trial]
                if self._races and role == "search" and record.ask is not None:
                    self._look(record)

    def _look(self, record: TrialRecord) -> None:
        """Stop a candidate if its results so far say so."""
        scored = self._schedule.scored(record.number)
        num_chunks = self._races.stops_after(record, scored, self._ledger)
        if num_chunks is not None:
            self._schedule.stop(record.number, num_chunks)


def _is_of(scored: ScoredChunk | None, chunk: Chunk) -> bool:
    """Whether stored results are those of a chunk: what is confirmed on may change."""
    return scored is not None and {t: i.ids for t, i in scored.result.items()} == dict(chunk.items)
