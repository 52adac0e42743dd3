"""Schedule: which chunk goes to which worker, and what has come back. Results depend on neither.

A worker stays with its candidate while that has chunks left (its weights are live there), then
takes the first candidate nobody has begun, and at the end of a generation shares the chunks of
candidates that others work on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from evomerge.config.recipe import Recipe
from evomerge.evaluate.evaluator import Chunk, EvalResult, join_results
from evomerge.study.items import ScoredChunk
from evomerge.study.records import State
from evomerge.workers.job import Job, Outcome

MAX_ATTEMPTS = 3
"""Workers that may be lost on one candidate before it is marked failed."""


@dataclass(frozen=True)
class Scored:
    """A candidate all of whose chunks came back, or the reason why it failed.

    Attributes:
        trial: Its trial's number.
        result: Results per item, chunks joined; None for a failure.
        state: `done`, `stopped`, `invalid` or `failed`.
        chunks: What was scored, in order of the chunks; of a stopped one, those that decided.
        attempt: Tries it took.
        error: One sentence, for failures.
    """

    trial: int
    state: State
    result: EvalResult | None
    chunks: tuple[ScoredChunk, ...]
    attempt: int
    error: str | None = None


@dataclass
class _Open:
    """One candidate under way."""

    recipe: Recipe
    waiting: list[Chunk]
    scored: dict[int, ScoredChunk]
    races: bool
    running: int = 0
    attempt: int = 1
    failure: tuple[State, str] | None = None
    failed_at: int = 0
    stopped: int | None = None

    @property
    def begun(self) -> bool:
        return bool(self.running or self.scored)

    @property
    def over(self) -> bool:
        return not self.running and not self.waiting

    def fail(self, state: State, error: str, before: int) -> None:
        """Give up; chunks before one that failed may still show that it was to be stopped."""
        if self.failure is None or before < self.failed_at:
            self.failure, self.failed_at = (state, error), before
        self.waiting = [chunk for chunk in self.waiting if chunk.index < before]


@dataclass
class Schedule:
    """The candidates under way, in the order they were added."""

    _open: dict[int, _Open] = field(default_factory=dict)
    _last: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        trial: int,
        recipe: Recipe,
        chunks: tuple[Chunk, ...],
        known: Mapping[int, ScoredChunk],
        races: bool = False,
    ) -> None:
        """Add a candidate; chunks that are known already are not scored again.

        Args:
            trial: Its trial's number.
            recipe: What to merge.
            chunks: What to score it on.
            known: What has been scored, by index.
            races: Whether it may be stopped. When one of its chunks fails, those before it are
                still scored: whether it fails or is stopped does not depend on timing.
        """
        waiting = [chunk for chunk in chunks if chunk.index not in known]
        self._open[trial] = _Open(recipe, waiting, dict(known), races)

    def __len__(self) -> int:
        return len(self._open)

    def next_job(self, worker: str) -> Job | None:
        """Return what an idle worker should do next and count it as running; None if nothing."""
        trial = self._choose(worker)
        if trial is None:
            return None
        candidate = self._open[trial]
        candidate.running += 1
        self._last[worker] = trial
        return Job(trial, candidate.recipe, candidate.waiting.pop(0), candidate.attempt)

    def settle(self, outcome: Outcome) -> ScoredChunk | None:
        """Take in an outcome.

        Returns:
            The chunk's results, to be stored; None for anything but `done`.
        """
        candidate = self._open[outcome.job.trial]
        candidate.running -= 1
        if outcome.kind == "done":
            return self._scored(candidate, outcome)
        if candidate.stopped is not None:
            return None
        if outcome.kind == "lost" and candidate.attempt < MAX_ATTEMPTS:
            candidate.attempt += 1
            candidate.waiting.insert(0, outcome.job.chunk)
        elif outcome.kind == "lost":
            reason = f"lost {MAX_ATTEMPTS} times (last: {outcome.error})"
            candidate.fail("failed", reason, before=0)
        else:
            before = outcome.job.chunk.index if candidate.races else 0
            candidate.fail(outcome.kind, outcome.error or outcome.kind, before)
        return None

    def scored(self, trial: int) -> Mapping[int, ScoredChunk]:
        """Return the chunks of a candidate under way that have come back, by index."""
        return self._open[trial].scored

    def stop(self, trial: int, num_chunks: int) -> None:
        """Score a candidate no further; its first chunks, so many, are its result.

        Chunks that were running come back later; the first decision stands.
        """
        candidate = self._open[trial]
        if candidate.stopped is None:
            candidate.stopped, candidate.waiting = num_chunks, []

    def over(self) -> list[int]:
        """Return the candidates that nothing more will come of, in the order they were added."""
        return [trial for trial, candidate in self._open.items() if candidate.over]

    def take(self, trial: int) -> Scored:
        """Remove a candidate that is over and return what came of it."""
        candidate = self._open.pop(trial)
        assert candidate.over, f"trial {trial} is still under way"
        known = sorted(candidate.scored)[: candidate.stopped]
        chunks = tuple(candidate.scored[index] for index in known)
        if candidate.stopped is not None:
            candidate.failure = None  # of a later chunk, which should not have been begun
        digests = {chunk.digest for chunk in chunks}
        if candidate.failure is None and len(digests) > 1:
            workers = ", ".join(sorted({chunk.worker for chunk in chunks}))
            candidate.failure = (
                "failed",
                f"workers {workers} made different weights of one recipe. Check that all nodes "
                "read the same model files and run the same versions.",
            )
        if candidate.failure is not None:
            state, error = candidate.failure
            return Scored(trial, state, None, chunks, candidate.attempt, error)
        result = join_results([chunk.result for chunk in chunks])
        ended: State = "done" if candidate.stopped is None else "stopped"
        return Scored(trial, ended, result, chunks, candidate.attempt)

    def _choose(self, worker: str) -> int | None:
        ready = [t for t, c in self._open.items() if c.waiting]
        last = self._last.get(worker)
        if last in ready:
            return last
        fresh = [t for t in ready if not self._open[t].begun]
        if fresh:
            return fresh[0]
        # the bubble at the end of a generation: share the candidate with most left to do
        return max(ready, key=lambda t: (len(self._open[t].waiting), -t), default=None)

    def _scored(self, candidate: _Open, outcome: Outcome) -> ScoredChunk:
        assert outcome.result is not None, "a job that is done has a result"
        assert outcome.digest is not None, "a job that is done has a digest"
        chunk = ScoredChunk(
            index=outcome.job.chunk.index,
            result=outcome.result,
            digest=outcome.digest,
            worker=outcome.worker,
            kernels=outcome.kernels,
            seconds_merge=outcome.seconds_merge,
            seconds_score=outcome.seconds_score,
        )
        candidate.scored[chunk.index] = chunk
        return chunk
