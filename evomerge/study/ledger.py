"""Ledger: every trial of a study, and what follows from them.

The dedupe memory, the budget spent, the best so far.
"""

from bisect import insort
from collections.abc import Callable, Iterable

from evomerge.config.recipe import Recipe
from evomerge.study.records import FINISHED, TrialRecord


def hash_of(recipe: Recipe) -> str:
    """Return the recipe's own hash."""
    return recipe.hash


class Ledger:
    """The trials of a study by number; whatever it answers is a function of them.

    Args:
        records: Trials that are known.
        merge_hash: Hash of a recipe that is equal for recipes of one merge. Only open trials are
            asked about: whether one that is finished was scored is recorded.
    """

    def __init__(
        self,
        records: Iterable[TrialRecord] = (),
        merge_hash: Callable[[Recipe], str] = hash_of,
    ) -> None:
        self._records: dict[int, TrialRecord] = {}
        self._merge_hash = merge_hash
        self._merges: dict[str, str] = {}  # by recipe hash
        self._same: dict[str, list[int]] = {}  # by merge, trials in order of their numbers
        for record in records:
            self.put(record)

    def put(self, record: TrialRecord) -> None:
        """Add a trial, or replace what is known of it."""
        self._records[record.number] = record
        same = self._same.setdefault(self.merge_of(record), [])
        if record.number not in same:
            insort(same, record.number)

    def merge_of(self, record: TrialRecord) -> str:
        """Return the hash that a trial's recipe has in common with all of the same merge."""
        digest = record.recipe.hash
        if digest not in self._merges:
            self._merges[digest] = self._merge_hash(record.recipe)
        return self._merges[digest]

    def __getitem__(self, number: int) -> TrialRecord:
        return self._records[number]

    @property
    def records(self) -> list[TrialRecord]:
        """All trials by number."""
        return [self._records[number] for number in sorted(self._records)]

    @property
    def candidates(self) -> list[TrialRecord]:
        """Trials that the proposer asked for, by number."""
        return [record for record in self.records if record.ask is not None]

    @property
    def baselines(self) -> dict[str, TrialRecord]:
        """Baselines by name, in the order they were scored."""
        return {record.baseline: record for record in self.records if record.baseline is not None}

    @property
    def open(self) -> list[TrialRecord]:
        """Trials without a result, by number."""
        return [record for record in self.records if record.state not in FINISHED]

    def original_of(self, record: TrialRecord) -> TrialRecord | None:
        """Return the earlier trial of the same merge; None when this is the first.

        One that racing stopped, and whose end the proposer knew of when it asked again, does not
        count: the later trial is scored on, from where that one stopped.
        """
        if record.result is not None:
            # scored or not, it stays so: an earlier version may have known fewer merges as the same
            told = record.result.duplicate_of
            return None if told is None else self._records[told]
        earlier = (self._records[n] for n in self._same[self.merge_of(record)])
        return next((e for e in earlier if _stands_for(e, record)), None)

    def stopped_before(self, record: TrialRecord) -> list[TrialRecord]:
        """Return the earlier trials of the same merge that racing stopped, by number."""
        earlier = (self._records[n] for n in self._same[self.merge_of(record)])
        return [e for e in earlier if e.number < record.number and e.state == "stopped"]

    @property
    def num_asks(self) -> int:
        """Candidates asked for so far."""
        return len(self.candidates)

    @property
    def num_tells(self) -> int:
        """Results told to the proposer so far."""
        return sum(r.result is not None and r.result.tell_seq is not None for r in self.records)

    @property
    def num_evaluations(self) -> int:
        """Candidates that count against the budget: all but duplicates, finished or not."""
        return sum(self.original_of(record) is None for record in self.candidates)

    @property
    def num_examples(self) -> int:
        """Items scored, over all trials."""
        return sum(record.result.examples for record in self.records if record.result)

    @property
    def num_examples_of_candidates(self) -> int:
        """Items scored for candidates, which is what counts against the budget."""
        return sum(record.result.examples for record in self.candidates if record.result)

    @property
    def elapsed_s(self) -> float:
        """Seconds the search had run when the last result was recorded."""
        return max((r.result.elapsed_s for r in self.records if r.result), default=0.0)

    @property
    def worst_loss(self) -> float | None:
        """The largest loss that was scored, extra baselines left out; None before the first."""
        records = [record for record in self.records if not record.is_extra]
        losses = [-r.result.fitness for r in records if r.result and r.result.fitness is not None]
        return max(losses, default=None)

    @property
    def best(self) -> TrialRecord | None:
        """The candidate of highest fitness, the earliest of equals; None before the first score."""
        done = [r for r in self.candidates if r.state == "done" and r.result]
        return max(done, key=_fitness_then_age, default=None)

    def ranked(self) -> list[TrialRecord]:
        """Return the scored candidates, best first, the earlier of equals first."""
        done = [r for r in self.candidates if r.state == "done" and r.result]
        return sorted(done, key=_fitness_then_age, reverse=True)

    def duplicates_in_a_row(self) -> int:
        """Return how many of the last candidates were nothing new.

        They are duplicates, or were stopped again on the items that had stopped them before.
        """
        count = 0
        for record in reversed(self.candidates):
            if self.original_of(record) is None and not _cost_nothing(record):
                break
            count += 1
        return count


def _cost_nothing(record: TrialRecord) -> bool:
    return record.state == "stopped" and record.result is not None and not record.result.examples


def _stands_for(earlier: TrialRecord, record: TrialRecord) -> bool:
    if earlier.number >= record.number:
        return False
    if earlier.state != "stopped" or earlier.result is None or record.ask is None:
        return True
    return earlier.result.tell_seq is None or earlier.result.tell_seq >= record.ask.after


def _fitness_then_age(record: TrialRecord) -> tuple[float, int]:
    assert record.result is not None, "only scored trials are ranked"
    assert record.result.fitness is not None, "a trial that is done has a fitness"
    return record.result.fitness, -record.number
