"""What a study remembers: one record per trial, and the states a trial goes through.

waiting -> running -> done | stopped | duplicate | invalid | failed
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from evomerge.config.recipe import Recipe
from evomerge.evaluate.evaluator import TaskMetric

State = Literal["waiting", "running", "done", "stopped", "duplicate", "invalid", "failed"]
FINISHED: tuple[State, ...] = ("done", "stopped", "duplicate", "invalid", "failed")

EXTRA_BASELINES = ("lambda", "ties", "model_stock", "random", "mean")
"""What the names of baselines begin with that a study can go without: one that cannot be scored is
left out, and what the proposer is told does not depend on them."""

KnobValue = float | int | bool | str


@dataclass(frozen=True)
class Ask:
    """How a candidate was asked for.

    Attributes:
        seq: Position in the proposer's sequence of asks, from 0.
        after: Number of tells the proposer had seen.
        genome: The vector it proposed, in [0, 1] per knob; the recorded vector is the truth.
    """

    seq: int
    after: int
    genome: tuple[float, ...]


@dataclass(frozen=True)
class TrialResult:
    """What came of a trial.

    Attributes:
        state: One of the finished states.
        fitness: The objective; None for failures, and for those that racing stopped.
        stderr: Its standard error, where it is known.
        tasks: The chosen metric of each task; of a stopped one, on the items it was scored on.
        examples: Items scored for this trial; 0 for a duplicate.
        seconds_merge: Seconds spent on materialising weights.
        seconds_score: Seconds spent on scoring.
        worker: The worker (or workers) that did it.
        kernels: Which implementations of the merge kernels made the weights; equal bits all.
        attempt: Tries it took.
        digest: Digest of the scored weights.
        duplicate_of: Trial whose result was told again.
        tell_seq: Position in the sequence of tells; None for baselines.
        told_loss: What the proposer was told; None for baselines. For a stopped trial it is what
            the whole score is expected to be, the sign turned.
        error: One sentence, for failures.
        elapsed_s: Seconds the search had run, over all its sessions.
    """

    state: State
    fitness: float | None = None
    stderr: float | None = None
    tasks: Mapping[str, TaskMetric] = field(default_factory=dict)
    examples: int = 0
    seconds_merge: float = 0.0
    seconds_score: float = 0.0
    worker: str = ""
    kernels: str = ""
    attempt: int = 1
    digest: str | None = None
    duplicate_of: int | None = None
    tell_seq: int | None = None
    told_loss: float | None = None
    error: str | None = None
    elapsed_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain data; floats survive a round trip exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TrialResult":
        """Make the record from `to_json`'s data."""
        tasks = {name: TaskMetric(**score) for name, score in data["tasks"].items()}
        return replace(cls(**{**data, "tasks": {}}), tasks=tasks)


@dataclass(frozen=True)
class TrialRecord:
    """One trial as the study holds it.

    Attributes:
        number: Its number in the Optuna study.
        state: Where it stands.
        recipe: The merge it scores.
        values: Decoded knob values; empty for a baseline.
        ask: How it was asked for; None for a baseline.
        baseline: Name of the baseline (`base`, `parent:math`, `uniform`, `greedy_soup`, and its
            steps, `greedy:1`; see `study/baselines.py`); None for a candidate.
        result: What came of it; None while it is open.
    """

    number: int
    state: State
    recipe: Recipe
    values: Mapping[str, KnobValue]
    ask: Ask | None
    baseline: str | None
    result: TrialResult | None

    @property
    def is_parent(self) -> bool:
        """Whether it is the baseline of a parent."""
        return self.baseline is not None and self.baseline.startswith("parent:")

    @property
    def is_extra(self) -> bool:
        """Whether it is a baseline that the study can go without."""
        return self.baseline is not None and self.baseline.startswith(EXTRA_BASELINES)
