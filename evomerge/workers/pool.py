"""Pools: where jobs run. The inline pool runs the same worker in this process, without Ray."""

import time
from abc import ABC, abstractmethod

from typing_extensions import override

from evomerge.evaluate.evaluator import SuiteFacts
from evomerge.evaluate.time_limit import Clock
from evomerge.workers.job import Job, Outcome, WorkerSettings
from evomerge.workers.worker import Worker


class AbstractPool(ABC):
    """A set of workers. Every job submitted comes back once: done, invalid, failed, or lost."""

    @abstractmethod
    def facts(self) -> SuiteFacts:
        """Return what the first ready worker says of the suite; waits for it.

        Raises:
            EvoMergeError: No worker can be prepared; the worker's own sentence.
        """

    @abstractmethod
    def idle(self) -> tuple[str, ...]:
        """Return the workers that can take a job now, in a fixed order."""

    @abstractmethod
    def submit(self, worker: str, job: Job) -> None:
        """Give a job to an idle worker."""

    @abstractmethod
    def collect(self, timeout_s: float) -> list[Outcome]:
        """Return outcomes that have come; waits up to `timeout_s` for the first.

        Empty when none came in time.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop the workers; jobs under way are dropped. May be called twice."""


class InlinePool(AbstractPool):
    """One worker in this process; a job runs while `collect` waits for it.

    Args:
        settings: What the worker prepares.
        clock: Tells the time, for the suite's time limit.
    """

    name = "inline"

    def __init__(self, settings: WorkerSettings, clock: Clock = time.monotonic) -> None:
        self._worker = Worker(settings, self.name, clock)
        self._job: Job | None = None

    @override
    def facts(self) -> SuiteFacts:
        return self._worker.facts()

    @override
    def idle(self) -> tuple[str, ...]:
        return () if self._job else (self.name,)

    @override
    def submit(self, worker: str, job: Job) -> None:
        assert worker == self.name, f"no worker {worker}"
        assert self._job is None, "the inline worker is busy"
        self._job = job

    @override
    def collect(self, timeout_s: float) -> list[Outcome]:
        job, self._job = self._job, None
        return [] if job is None else [self._worker.run(job)]

    @override
    def close(self) -> None:
        self._worker.close()
