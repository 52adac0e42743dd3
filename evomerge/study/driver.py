"""The one loop of a search: ask, record, submit, record, tell.

Nothing else iterates over candidates. The study is the only durable truth. The proposer is a
function of its specification and the log, so a driver that was killed at any moment is rebuilt from
the storage alone: half-recorded trials are closed, the log is replayed, and open trials are taken
up under their old numbers, with the chunks that were scored already.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from evomerge.config.recipe import Recipe
from evomerge.config.suite import ItemRole
from evomerge.errors import EvaluationError, InterruptedStudy, StudyError
from evomerge.propose.proposer import AbstractProposer, replay
from evomerge.space.decode import decode, values_of
from evomerge.space.genome import Genome
from evomerge.study.baselines import (
    RANDOM,
    RANDOM_STEP,
    baseline_recipes,
    next_baseline,
    random_recipe,
)
from evomerge.study.confirmation import (
    MEAN,
    NO_REPORT_ITEMS,
    Confirmation,
    choose_winner,
    pass_verdict,
    shortlist,
)
from evomerge.study.items import ItemStore
from evomerge.study.ledger import Ledger
from evomerge.study.records import Ask, TrialRecord, TrialResult
from evomerge.study.results import Metrics, result_of, retold
from evomerge.study.schedule import Scored
from evomerge.study.scoring import Scoring
from evomerge.study.setup import Setup
from evomerge.study.storage import StudyStorage
from evomerge.study.summary import summarise
from evomerge.workers.logs import about_trial
from evomerge.workers.pool import AbstractPool

log = logging.getLogger(__name__)

EXHAUSTED_GENERATIONS = 10
"""Whole generations of duplicates after which a space counts as exhausted."""

Summary = dict[str, Any]


@dataclass(frozen=True)
class Surroundings:
    """What a driver works with, passed in so that tests can put faults anywhere.

    Attributes:
        storage: The study.
        items: Results per item.
        pool: Workers.
        proposer: Fresh, not yet asked.
        observe: Called with the study's summary after every change.
        interrupted: Whether the user asked to stop.
        clock: Seconds, from any zero.
        confirmed: Earlier confirmations of the study; the setup's tasks give other items.
    """

    storage: StudyStorage
    items: ItemStore
    pool: AbstractPool
    proposer: AbstractProposer
    observe: Callable[[Summary], None]
    interrupted: Callable[[], bool]
    clock: Callable[[], float] = time.monotonic
    confirmed: tuple[Confirmation, ...] = ()


class Driver:
    """Runs one study from where it stands to the end of its budget, then confirms the winner.

    Args:
        setup: The search, resolved.
        around: What it works with.
    """

    def __init__(self, setup: Setup, around: Surroundings) -> None:
        self._setup, self._around = setup, around
        self._storage = around.storage
        self._proposer = around.proposer
        self._ledger = Ledger(merge_hash=setup.merge_hash)
        self._started = around.clock()
        self._elapsed_before = 0.0
        self._state = "running"
        self._confirmed = around.confirmed
        self._notes: Any = None  # what was known of the study before it ran, likewise

    def run(self) -> Ledger:
        """Go on until the budget is spent.

        Returns:
            The ledger of all trials.

        Raises:
            InterruptedStudy: The user asked to stop; everything that finished is stored.
            StudyError: The storage failed, replay did not match, or a baseline cannot be scored.
        """
        self._restore()
        self._storage.set_attribute("state", "running")
        try:
            self._score_baselines()
            state = self._search()
            self._score_random()
            if not self._is_confirmed():
                self._confirm()
        except InterruptedStudy:
            self._storage.set_attribute("state", "interrupted")
            raise
        self._storage.set_attribute("state", state)
        self._report(state)
        return self._ledger

    def confirm(self) -> Confirmation:
        """Confirm what has been found so far, on items that no confirmation has used yet.

        Raises:
            InterruptedStudy: As `run`.
            StudyError: As `run`; or nothing has been found, or no such items are left.
        """
        self._restore(take_up=False)
        name = self._storage.name
        if self._ledger.best is None:
            raise StudyError(f"study {name!r}: no candidate has been scored yet. Resume it first.")
        if not self._setup.tasks.chunks("confirm"):
            raise StudyError(
                f"study {name!r}: no confirm items are left that were not used. Give "
                "suite.items.confirm a count that leaves some, or another split."
            )
        self._confirm()
        return self._confirmed[-1]

    def _restore(self, take_up: bool = True) -> None:
        records = self._storage.trials()
        half = [(r.number, r.result) for r in records if r.state == "running" and r.result]
        for number, result in half:
            self._storage.close_recorded(number, result)
        known = self._storage.trials() if half else records
        self._ledger = Ledger(known, self._setup.merge_hash)
        self._notes = self._storage.attribute("notes")
        self._elapsed_before = self._ledger.elapsed_s
        around, turn = self._around, len(self._confirmed) + 1
        self._scoring = Scoring(
            self._setup, self._ledger, around.storage, around.items, around.pool, turn
        )
        _replay(self._proposer, self._ledger)
        for record in self._ledger.open if take_up else ():
            self._take_up(record)
        if records:
            log.info("resumed: %d trials, %d of them open", len(records), len(self._ledger.open))

    def _score_baselines(self) -> None:
        known = self._ledger.baselines
        for name, recipe in baseline_recipes(self._setup).items():
            if name not in known:
                self._add_baseline(name, recipe)
        self._await_baselines()
        while step := next_baseline(self._setup, self._ledger.baselines):
            self._add_baseline(*step)
            self._await_baselines()

    def _score_random(self) -> None:
        """Score random candidates on as many items as the search has scored its own on."""
        if RANDOM in self._setup.config.study.baselines:
            known = self._ledger.baselines
            whole = sum(chunk.num_items for chunk in self._setup.tasks.chunks("search"))
            for number in range(-(-self._ledger.num_examples_of_candidates // whole)):
                if f"{RANDOM_STEP}{number}" not in known:
                    recipe = random_recipe(self._setup, number)
                    self._add_baseline(f"{RANDOM_STEP}{number}", recipe)
            self._await_baselines()

    def _add_baseline(self, name: str, recipe: Recipe) -> TrialRecord:
        record = self._storage.add_baseline(name, recipe)
        self._ledger.put(record)
        self._take_up(record)
        return record

    def _await_baselines(self) -> None:
        while waiting := [r for r in self._ledger.baselines.values() if r.result is None]:
            # recorded together: relative objectives need every parent's score
            if all(self._can_record(record) for record in waiting):
                self._record_baselines(waiting)
            else:
                self._turn()
        for name, record in self._ledger.baselines.items():
            if record.state not in ("done", "duplicate") and not record.is_extra:
                error = record.result.error if record.result else None
                raise StudyError(
                    f"baseline {name} cannot be scored ({error}). Nothing can be compared without "
                    "it: mend the cause, then start a study of another name."
                )

    def _search(self) -> str:
        synchronous = self._setup.config.proposer.mode == "sync"
        while True:
            self._ask_generation() if synchronous else self._ask_for_idle()
            if not self._ledger.open:
                return "exhausted" if self._exhausted() else "done"
            self._turn()
            self._record_in_order() if synchronous else self._record_as_they_come()

    def _ask_generation(self) -> None:
        population = self._setup.config.proposer.population
        begun = self._ledger.num_asks % population != 0
        if self._ledger.open and not begun:
            return
        if not begun and not self._may_begin():
            return
        if begun and self._ledger.num_tells == self._ledger.num_asks and not self._may_begin():
            return  # a generation that the budget cut short stays so until the budget grows
        while self._may_ask():
            self._ask()
            if self._ledger.num_asks % population == 0:
                break

    def _ask_for_idle(self) -> None:
        while len(self._ledger.open) < self._setup.config.workers.count and self._may_begin():
            self._ask()

    def _may_begin(self) -> bool:
        budget = self._setup.config.study.budget
        if (
            budget.examples is not None
            and self._ledger.num_examples_of_candidates >= budget.examples
        ):
            return False
        if budget.seconds is not None and self._elapsed() >= budget.seconds:
            return False
        return self._may_ask() and not self._exhausted()

    def _may_ask(self) -> bool:
        limit = self._setup.config.study.budget.evaluations
        return limit is None or self._ledger.num_evaluations < limit

    def _exhausted(self) -> bool:
        population = self._setup.config.proposer.population
        return self._ledger.duplicates_in_a_row() >= EXHAUSTED_GENERATIONS * population

    def _ask(self) -> None:
        setup = self._setup
        vector = self._proposer.ask()
        ask = Ask(self._ledger.num_asks, self._ledger.num_tells, tuple(map(float, vector)))
        genome = Genome(ask.genome)
        recipe = decode(setup.space, genome, setup.template)
        values = values_of(setup.space, genome)
        record = self._storage.add_candidate(ask, recipe, values, setup.space.knobs)
        self._ledger.put(record)
        self._take_up(record)

    def _take_up(self, record: TrialRecord) -> None:
        if self._ledger.original_of(record) is None:
            self._scoring.add(record, "search")

    def _turn(self) -> None:
        if self._around.interrupted():
            raise InterruptedStudy(
                f"study {self._storage.name!r} was stopped; what finished is stored."
            )
        self._scoring.advance()

    def _can_record(self, record: TrialRecord) -> bool:
        first = self._ledger.original_of(record) or record
        return first.result is not None or self._scoring.is_over(first)

    def _record_in_order(self) -> None:
        for record in self._ledger.open:
            if not self._can_record(record):
                return
            self._record(record)

    def _record_as_they_come(self) -> None:
        for record in self._ledger.open:
            if self._can_record(record):
                self._record(record)

    def _record_baselines(self, waiting: list[TrialRecord]) -> None:
        parents = self._parents()
        firsts = [self._ledger.original_of(r) or r for r in waiting if r.is_parent]
        for first in firsts:
            if first.result is not None:
                parents.append(first.result.tasks)
            elif (metrics := self._scoring.metrics_of(first)) is not None:
                parents.append(metrics)
        for record in waiting:
            self._record(record, parents)

    def _parents(self) -> list[Metrics]:
        records = self._ledger.baselines.values()
        return [r.result.tasks for r in records if r.is_parent and r.result]

    def _record(self, record: TrialRecord, parents: list[Metrics] | None = None) -> None:
        original = self._ledger.original_of(record)
        if original is None:
            known = self._parents() if parents is None else parents
            scored = self._scoring.take(record)
            result = result_of(self._setup, scored, known)
            before = [r.result for r in self._ledger.stopped_before(record)]
            paid = sum(stopped.examples for stopped in before if stopped)
            result = replace(result, examples=max(0, result.examples - paid))
            stopped = result.state == "stopped"
            loss = -self._scoring.told(record, scored) if stopped else self._loss_of(result)
        else:
            result = retold(original)
            assert original.result is not None, "the original is recorded before its duplicate"
            stopped = result.state == "stopped"
            loss = original.result.told_loss if stopped else self._loss_of(result)
        result = replace(result, elapsed_s=round(self._elapsed(), 3))
        if record.ask is not None:
            result = replace(result, tell_seq=self._ledger.num_tells, told_loss=loss)
        if record.state == "waiting":
            self._storage.start(record.number)
        self._storage.finish(record.number, result)
        self._ledger.put(replace(record, state=result.state, result=result))
        if record.ask is not None and result.told_loss is not None:
            self._proposer.tell(record.ask.seq, result.told_loss)
        with about_trial(record.number):
            log.info("%s %s", result.state, result.error or result.fitness)
        self._report(self._state)

    def _loss_of(self, result: TrialResult) -> float | None:
        return -result.fitness if result.fitness is not None else self._ledger.worst_loss

    def _is_confirmed(self) -> bool:
        """Whether nothing can be confirmed that is not confirmed yet."""
        if self._ledger.best is None or not self._setup.tasks.chunks("confirm"):
            return True
        return bool(self._confirmed) and self._confirmed[-1].num_tells == self._ledger.num_tells

    def _confirm(self) -> None:
        """Choose a winner on confirm items and test it on report items, all of them unused."""
        self._state = "confirming"
        self._report(self._state)
        mean = self._score_mean()
        records = shortlist(self._setup, self._ledger, mean)
        confirmed = choose_winner(self._setup, records, self._score_all(records, "confirm"))
        verdict, no_verdict = None, NO_REPORT_ITEMS
        if self._setup.tasks.chunks("report"):
            pair = {name: records[name] for name in (confirmed.winner, confirmed.parent)}
            try:
                verdict = pass_verdict(self._setup, confirmed, self._score_all(pair, "report"))
            except EvaluationError as error:
                no_verdict = f"no verdict: {error}"
        self._confirmed += (
            Confirmation(
                num_tells=self._ledger.num_tells,
                scores=confirmed.scores,
                winner=confirmed.winner,
                parent=confirmed.parent,
                used=self._setup.tasks.drawn(("confirm", "report")),
                verdict=verdict,
                no_verdict=None if verdict else no_verdict,
                dropped=confirmed.dropped,
            ),
        )
        stored = [confirmation.to_json() for confirmation in self._confirmed]
        self._storage.set_attribute("confirmations", stored)

    def _score_mean(self) -> TrialRecord | None:
        """Score what the proposer's mean decodes to on the search items; None where it has none."""
        mean = self._proposer.mean() if self._setup.config.confirm.mean else None
        if mean is None or not self._ledger.num_tells:
            return None
        name = f"{MEAN}:{self._ledger.num_tells}"
        if name not in self._ledger.baselines:
            genome = Genome(tuple(map(float, mean)))
            self._add_baseline(name, decode(self._setup.space, genome, self._setup.template))
        self._await_baselines()
        return self._ledger.baselines[name]

    def _score_all(self, records: Mapping[str, TrialRecord], role: ItemRole) -> dict[str, Scored]:
        """Score some trials on the items of a role; of those with one merge, the first for all."""
        firsts = {self._ledger.merge_of(r): r for r in reversed(list(records.values()))}
        for record in firsts.values():
            self._scoring.add(record, role)
        while not all(self._scoring.is_over(record) for record in firsts.values()):
            self._turn()
        found = {merge: self._scoring.take(record) for merge, record in firsts.items()}
        return {name: found[self._ledger.merge_of(record)] for name, record in records.items()}

    def _elapsed(self) -> float:
        return self._elapsed_before + self._around.clock() - self._started

    def _report(self, state: str) -> None:
        name = self._storage.name
        self._around.observe(summarise(name, state, self._ledger, self._confirmed, self._notes))


def _replay(proposer: AbstractProposer, ledger: Ledger) -> None:
    """Feed a fresh proposer the asks and tells of the log, in their order."""
    asks = [(r.ask.after, r.ask.genome) for r in ledger.candidates if r.ask]
    told = sorted(
        (r.result.tell_seq, r.ask.seq, r.result.told_loss)
        for r in ledger.candidates
        if r.ask and r.result and r.result.tell_seq is not None and r.result.told_loss is not None
    )
    replay(proposer, asks, [(ask_seq, loss) for _, ask_seq, loss in told])
