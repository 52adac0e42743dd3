"""Races of a study: which candidates are stopped and what is told of them, from the log and items.

Who the incumbent is follows from what the proposer had been told when it asked: in sync mode from
what stood when the generation began.
"""

from collections.abc import Collection, Mapping

from evomerge.errors import StudyError
from evomerge.evaluate.evaluator import EvalResult, join_results
from evomerge.evaluate.racing import Race
from evomerge.study.items import ItemStore, ScoredChunk
from evomerge.study.ledger import Ledger
from evomerge.study.records import TrialRecord
from evomerge.study.setup import Setup

MAX_RACES = 4
"""Incumbents whose results are kept in memory; in async mode candidates have different ones."""


class Races:
    """Decides for one study, whose parents are scored.

    Args:
        setup: The search.
        items: Its results per item.
    """

    def __init__(self, setup: Setup, items: ItemStore) -> None:
        self._setup, self._items = setup, items
        self._sync = setup.config.proposer.mode == "sync"
        self._mode = setup.config.racing.mode
        self._races: dict[int, Race] = {}  # by the incumbent's number
        self._first_chunks: dict[int, EvalResult] = {}  # by trial
        self._looks: dict[int, int] = {}  # chunks after which a trial was looked at

    def __bool__(self) -> bool:
        """Whether candidates race at all."""
        return self._mode != "off"

    def stops_after(
        self, record: TrialRecord, scored: Mapping[int, ScoredChunk], ledger: Ledger
    ) -> int | None:
        """Return after how many of its chunks a candidate is stopped; None if not, or not yet.

        Later chunks that came back earlier have no say.

        Args:
            record: The candidate.
            scored: Its chunks that have come back, by index.
            ledger: All trials.
        """
        race, known = self._race_of(record, ledger), []
        for index in range(len(scored)):
            if index not in scored:
                return None
            known.append(scored[index].result)
            if index < self._looks.get(record.number, 0):
                continue
            self._looks[record.number] = index + 1
            if race.stops(join_results(known)):
                return index + 1
        return None

    def can_tell(self, record: TrialRecord, over: Collection[int], ledger: Ledger) -> bool:
        """Whether all that a stopped candidate is judged beside has come back.

        Args:
            record: The candidate.
            over: Trials that are over and not recorded yet.
            ledger: All trials.
        """
        return all(
            peer.result is not None or peer.number in over or self._first_chunk(peer) is not None
            for peer in self._peers(record, ledger)
        )

    def told(self, record: TrialRecord, seen: EvalResult, ledger: Ledger) -> float:
        """Return the objective that a stopped candidate is told with.

        Args:
            record: The candidate.
            seen: Its results on the chunks that decided.
            ledger: All trials.
        """
        first = [self._first_chunk(peer) for peer in self._peers(record, ledger)]
        known = [chunk for chunk in first if chunk is not None]
        return self._race_of(record, ledger).told(seen, known)

    def _peers(self, record: TrialRecord, ledger: Ledger) -> list[TrialRecord]:
        """Return the candidates that one is judged beside, itself among them.

        In sync mode its generation; in async mode those told last, as many as a population has.
        """
        assert record.ask is not None, "only candidates race"
        candidates = [r for r in ledger.candidates if r.ask and ledger.original_of(r) is None]
        if self._sync:
            return [r for r in candidates if r.ask and r.ask.after == record.ask.after]
        told = sorted((_tell_seq(r), r.number) for r in candidates if _is_told(r))
        population = self._setup.config.proposer.population
        return [*(ledger[number] for _, number in told[1 - population :]), record]

    def _first_chunk(self, record: TrialRecord) -> EvalResult | None:
        if record.number not in self._first_chunks:
            if len(self._first_chunks) > 2 * self._setup.config.proposer.population:
                self._first_chunks.clear()
            chunks = self._items.read(record.recipe.hash, "search")
            if 0 not in chunks:
                return None
            self._first_chunks[record.number] = chunks[0].result
        return self._first_chunks[record.number]

    def _race_of(self, record: TrialRecord, ledger: Ledger) -> Race:
        incumbent = _incumbent(record, ledger)
        if incumbent.number not in self._races:
            if len(self._races) >= MAX_RACES:
                self._races.clear()
            self._races[incumbent.number] = self._race_against(incumbent, ledger)
        return self._races[incumbent.number]

    def _race_against(self, incumbent: TrialRecord, ledger: Ledger) -> Race:
        assert incumbent.result is not None, "an incumbent is scored"
        assert incumbent.result.fitness is not None, "an incumbent is scored"
        chunks = self._setup.tasks.chunks("search")
        scored = self._items.read(incumbent.recipe.hash, "search")
        if any(chunk.index not in scored for chunk in chunks):
            raise StudyError(
                f"racing.mode: results per item of trial {incumbent.number}, which candidates are "
                "compared with, are not beside the study any more. Put the folder items back, or "
                "resume with --set racing.mode=off."
            )
        result = join_results([scored[chunk.index].result for chunk in chunks])
        parents = [r.result.tasks for r in ledger.baselines.values() if r.is_parent and r.result]
        terms = self._setup.terms_at(incumbent.result.tasks, parents)
        return Race(self._mode, len(chunks), terms, result, incumbent.result.fitness)


def _incumbent(record: TrialRecord, ledger: Ledger) -> TrialRecord:
    """Return the best that was fully scored when a candidate was asked for, the first of equals."""
    assert record.ask is not None, "only candidates race"
    after = record.ask.after
    known = [
        r
        for r in ledger.records
        if r.state == "done" and not r.is_extra and (r.ask is None or _tell_seq(r) < after)
    ]
    return max(known, key=_fitness)


def _is_told(record: TrialRecord) -> bool:
    return record.result is not None and record.result.tell_seq is not None


def _tell_seq(record: TrialRecord) -> int:
    assert record.result is not None, "a trial that is done has a result"
    assert record.result.tell_seq is not None, "a candidate that is done was told"
    return record.result.tell_seq


def _fitness(record: TrialRecord) -> float:
    assert record.result is not None, "a trial that is done has a result"
    assert record.result.fitness is not None, "a trial that is done has a fitness"
    return record.result.fitness
