"""RayPool: long-lived actors on a Ray cluster, one worker each; the ones that die are replaced.

Actors never restart by themselves (`max_restarts=0`): every death is an explicit event, its job
comes back as lost, and a new actor is made. Models are read from disk by every worker; only
recipes, items and results travel.
"""

import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from evomerge.config.search import WorkersConfig
from evomerge.errors import EvoMergeError, MissingDependencyError, WorkerError
from evomerge.evaluate.evaluator import SuiteFacts
from evomerge.workers.job import Job, Outcome, WorkerSettings
from evomerge.workers.pool import AbstractPool
from evomerge.workers.worker import Worker, one_line

log = logging.getLogger(__name__)

START_ATTEMPTS = 3
"""Actors in a row that may die while they start before the pool gives up."""

LOCAL_OBJECT_STORE_BYTES = 80_000_000
"""Enough for jobs and results, and near the least Ray accepts; models never pass through it."""

KNOCK_TIMEOUT_S = 10.0
"""Longest wait for an answer from the head node's address."""


class _Actor:
    """What runs in an actor's process."""

    def prepare(self, settings: WorkerSettings, name: str) -> SuiteFacts:
        self.worker = Worker(settings, name)
        return self.worker.facts()

    def run(self, job: Job) -> Outcome:
        return self.worker.run(job)


@dataclass
class _Member:
    """One actor of the pool: starting while `facts` is None, idle while `job` is None."""

    name: str
    handle: Any
    pending: Any
    facts: SuiteFacts | None = None
    job: Job | None = None


class RayPool(AbstractPool):
    """Workers as Ray actors.

    Args:
        config: Address, number of workers, CPUs and GPUs of each.
        settings: What each worker prepares.

    Raises:
        MissingDependencyError: Ray is not installed.
        WorkerError: There is no cluster at the address, or it is too small.
    """

    def __init__(self, config: WorkersConfig, settings: WorkerSettings) -> None:
        self._ray = _import_ray()
        self._config, self._settings = config, settings
        self._owns_cluster = not self._ray.is_initialized()
        if self._owns_cluster:
            _connect(self._ray, config)
        self._class = self._ray.remote(_Actor).options(
            num_cpus=config.cpus, num_gpus=config.gpus, max_restarts=0
        )
        self._members: dict[str, _Member] = {}
        self._made = 0
        self._deaths_in_a_row = 0
        for _ in range(config.count):
            self._add_member()

    @override
    def facts(self) -> SuiteFacts:
        while True:
            ready = next((m.facts for m in self._members.values() if m.facts is not None), None)
            if ready is not None:
                return ready
            self._poll(timeout_s=10.0)

    @override
    def idle(self) -> tuple[str, ...]:
        self._poll(timeout_s=0.0, starting_only=True)
        return tuple(
            m.name for m in self._members.values() if m.facts is not None and m.job is None
        )

    @override
    def submit(self, worker: str, job: Job) -> None:
        member = self._members[worker]
        assert member.job is None, f"worker {worker} is busy"
        member.job, member.pending = job, member.handle.run.remote(job)

    @override
    def collect(self, timeout_s: float) -> list[Outcome]:
        return self._poll(timeout_s)

    @override
    def close(self) -> None:
        for member in self._members.values():
            self._ray.kill(member.handle)
        self._members = {}
        if self._owns_cluster:
            self._ray.shutdown()
            self._owns_cluster = False

    def _add_member(self) -> None:
        name = f"{self._made:03d}"
        self._made += 1
        handle = self._class.remote()
        self._members[name] = _Member(name, handle, handle.prepare.remote(self._settings, name))

    def _poll(self, timeout_s: float, starting_only: bool = False) -> list[Outcome]:
        waiting = {
            m.pending: m
            for m in self._members.values()
            if m.facts is None or (m.job is not None and not starting_only)
        }
        if not waiting:
            return []
        ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=timeout_s)
        if ready:  # take whatever else has come by now
            ready, _ = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        answers = [self._answer(waiting[reference]) for reference in ready]
        return [outcome for outcome in answers if outcome is not None]

    def _answer(self, member: _Member) -> Outcome | None:
        try:
            value = self._ray.get(member.pending)
        except self._ray.exceptions.RayTaskError as error:
            # a job's own errors come back in its outcome: this worker could not be prepared
            ours = isinstance(error.cause, EvoMergeError)
            raise (error.cause if ours else WorkerError(one_line(error))) from None
        except self._ray.exceptions.RayError as error:
            return self._buried(member, error)  # killed, out of memory, its node gone
        self._deaths_in_a_row = 0
        if member.facts is None:
            member.facts = value
            return None
        member.job = None
        return value

    def _buried(self, member: _Member, error: Exception) -> Outcome | None:
        del self._members[member.name]
        self._ray.kill(member.handle)
        why = _death(error)
        log.warning("worker %s was lost: %s", member.name, why)
        if member.job is None:
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row >= START_ATTEMPTS:
                raise WorkerError(
                    f"{START_ATTEMPTS} workers in a row died while they started (last: {why}). "
                    "Check memory and GPUs of the nodes, and the worker logs in the study's folder."
                )
        self._add_member()
        return Outcome(member.job, "lost", member.name, error=why) if member.job else None


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise MissingDependencyError(
            "ray is not installed. pip install 'evomerge[ray]', or set workers.pool: inline."
        ) from None
    return ray


def _connect(ray: Any, config: WorkersConfig) -> None:
    _knock(config.address)
    common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if config.address == "local":
            ray.init(
                address="local",
                num_cpus=max(config.count * config.cpus, 1),
                include_dashboard=False,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                **common,
            )
        else:
            ray.init(address=config.address, **common)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(config.address, error) from None
    _check_size([node["Resources"] for node in ray.nodes() if node["Alive"]], config)


def _knock(address: str) -> None:
    """Find out in seconds whether anything listens at `host:port`; Ray itself takes minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK_TIMEOUT_S).close()
    except OSError as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> WorkerError:
    reason = " ".join(str(error).split())[:200]
    return WorkerError(
        f"workers.address {address!r}: no Ray cluster answers ({reason}). "
        "Start one with 'ray start --head', or set workers.address: local."
    )


def _check_size(nodes: list[dict[str, float]], config: WorkersConfig) -> None:
    for kind, each in (("CPU", config.cpus), ("GPU", config.gpus)):
        most = max((node.get(kind, 0.0) for node in nodes), default=0.0)
        if each > most:
            raise WorkerError(
                f"workers: one worker needs {each:g} {kind}, the largest node of the cluster at "
                f"{config.address!r} has {most:g}. Lower workers.{kind.lower()}s or join a larger "
                "cluster."
            )


def _death(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
