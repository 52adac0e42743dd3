"""Confirmation: who is scored on items that no search has seen, who wins there, and the verdict.

In three steps, each on items of its own. The best of the search, the proposer's mean, the baselines
and the parents are scored on confirm items, and one merge and one parent are chosen there. These
two are scored on report items, and tested there, once. A further confirmation of a study takes
items that no earlier one has used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evomerge.errors import EvaluationError, StudyError
from evomerge.evaluate.evaluator import TaskMetric
from evomerge.evaluate.flags import flags_of
from evomerge.evaluate.verdict import Contender, Side, Verdict, choose, judge
from evomerge.study.baselines import main_baselines
from evomerge.study.ledger import Ledger
from evomerge.study.records import TrialRecord
from evomerge.study.results import Metrics
from evomerge.study.schedule import Scored
from evomerge.study.setup import Setup

MEAN = "mean"
"""What the names of trials of the proposer's mean begin with."""

TRIAL = "trial "
"""What the names of the best trials begin with."""

NO_REPORT_ITEMS = (
    "no verdict: there are no report items to test on. Give suite.items.report a count and run "
    "evomerge confirm."
)


@dataclass(frozen=True)
class ConfirmScore:
    """One model on confirm items; the fields are those of `scores` in a study's summary."""

    trial: int
    objective: float
    stderr: float | None
    tasks: Mapping[str, float]
    num_items: int


@dataclass(frozen=True)
class Confirmation:
    """What a study keeps of one confirmation.

    Attributes:
        num_tells: What the proposer had been told by then; more, and the search has gone on.
        scores: Scores on confirm items by name: `trial 41`, `mean`, `uniform`, `parent:math`.
        winner: Name of the merge that is best there.
        parent: Name of the best parent there, or `base`.
        used: Items of confirm and report, by task and split.
        verdict: The test of these two on report items; None where there was none.
        no_verdict: Then, why.
        dropped: Name → why it has no score.
    """

    num_tells: int
    scores: Mapping[str, ConfirmScore]
    winner: str
    parent: str
    used: Mapping[str, Mapping[str, Sequence[int]]]
    verdict: Verdict | None
    no_verdict: str | None
    dropped: Mapping[str, str]

    @property
    def trial(self) -> int:
        """The winner's trial."""
        return self.scores[self.winner].trial

    def to_json(self) -> dict[str, Any]:
        """Return plain data; floats survive a round trip exactly."""
        verdict = self.verdict.to_json() if self.verdict else None
        return {**asdict(self), "verdict": verdict}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Confirmation":
        """Make the record from `to_json`'s data."""
        scores = {name: ConfirmScore(**score) for name, score in data["scores"].items()}
        verdict = Verdict.from_json(data["verdict"]) if data["verdict"] else None
        return cls(**{**data, "scores": scores, "verdict": verdict})


def used_items(confirmed: Sequence[Confirmation]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the items that confirmations have used, by task and split."""
    used: dict[str, dict[str, tuple[int, ...]]] = {}
    for confirmation in confirmed:
        for task, splits in confirmation.used.items():
            for split, ids in splits.items():
                known = used.setdefault(task, {})
                known[split] = (*known.get(split, ()), *ids)
    return used


def is_parent(name: str) -> bool:
    """Whether a name of a confirmation is of a model that was not merged."""
    return name == "base" or name.startswith("parent:")


def shortlist(setup: Setup, ledger: Ledger, mean: TrialRecord | None) -> dict[str, TrialRecord]:
    """Return who is scored on confirm items, by name: what is simpler first.

    Args:
        setup: The search.
        ledger: All trials; the baselines among them are scored.
        mean: The trial of the proposer's mean, if there is one.
    """
    chosen = {
        name: record
        for name, record in main_baselines(ledger.baselines).items()
        if not name.startswith(MEAN)
    }
    if mean is not None and mean.result is not None and mean.result.fitness is not None:
        chosen[MEAN] = mean
    best = ledger.ranked()[: setup.config.confirm.best]
    return chosen | {f"{TRIAL}{record.number}": record for record in best}


@dataclass(frozen=True)
class Confirmed:
    """What was scored on confirm items, and whom that chose.

    Attributes:
        records: By name.
        metrics: The chosen metric of each task, of those that could be scored.
        scores: Likewise.
        dropped: The others, name → why.
        winner: Name of the best merge.
        parent: Name of the best parent or `base`.
    """

    records: Mapping[str, TrialRecord]
    metrics: Mapping[str, Metrics]
    scores: Mapping[str, ConfirmScore]
    dropped: Mapping[str, str]
    winner: str
    parent: str

    @property
    def parents(self) -> list[Metrics]:
        """Metrics of the parents."""
        return [self.metrics[name] for name in self.metrics if name.startswith("parent:")]


def choose_winner(
    setup: Setup, records: Mapping[str, TrialRecord], scored: Mapping[str, Scored]
) -> Confirmed:
    """Choose a merge and a parent by their scores on confirm items.

    Args:
        setup: The search.
        records: As of `shortlist`.
        scored: What came back, by name.

    Raises:
        StudyError: A parent, or every merge, could not be scored.
    """
    metrics: dict[str, Metrics] = {}
    dropped: dict[str, str] = {}
    for name, one in scored.items():
        try:
            metrics[name] = _metrics(setup, one)
        except EvaluationError as error:
            dropped[name] = str(error)
            if is_parent(name):
                raise StudyError(
                    f"trial {one.trial} ({name}) cannot be scored on the confirm items ({error}). "
                    "Mend the cause and resume."
                ) from None
    parents = [metrics[name] for name in metrics if name.startswith("parent:")]
    scores = {}
    for name, found in list(metrics.items()):
        try:
            scores[name] = _score(setup, records[name], found, parents)
        except EvaluationError as error:
            dropped[name] = str(error)
    if all(is_parent(name) for name in scores):
        reason = next(iter(dropped.values()), "none was scored")
        raise StudyError(
            f"no merge can be scored on the confirm items ({reason}). Mend the cause and resume."
        )
    merge, parent = choose([Contender(n, s.objective, not is_parent(n)) for n, s in scores.items()])
    return Confirmed(records, metrics, scores, dropped, merge.name, parent.name)


def pass_verdict(setup: Setup, confirmed: Confirmed, reports: Mapping[str, Scored]) -> Verdict:
    """Test the chosen merge against the chosen parent on report items.

    What parent-relative scores are relative to are the parents on confirm items.

    Args:
        setup: The search.
        confirmed: Whom the confirm items chose.
        reports: What came back of the two on report items, by name.

    Raises:
        EvaluationError: One has no score there, or there are too few items.
    """
    parents = confirmed.parents
    sides = [
        _side(setup, confirmed, name, reports[name])
        for name in (confirmed.winner, confirmed.parent)
    ]
    return judge(setup.terms_at(confirmed.metrics[confirmed.winner], parents), *sides)


def _side(setup: Setup, confirmed: Confirmed, name: str, report: Scored) -> Side:
    record, parents = confirmed.records[name], confirmed.parents
    metrics = _metrics(setup, report)
    assert report.result is not None, "what has metrics has results"
    assert record.result is not None, "who is on the shortlist is scored"
    assert record.result.fitness is not None, "who is on the shortlist is scored"
    return Side(
        name=_called(name, record),
        search=record.result.fitness,
        report=setup.score_of(metrics, parents).value,
        items=setup.tasks.with_numbers(report.result),
        flags=flags_of(report.result, setup.objective.tasks),
    )


def _called(name: str, record: TrialRecord) -> str:
    """Return how a verdict calls one of the shortlist."""
    if is_parent(name):
        return "the base model" if name == "base" else f"parent {name.removeprefix('parent:')}"
    if name == MEAN:
        return f"trial {record.number} (the proposer's mean)"
    return name if record.baseline is None else f"baseline {name} (trial {record.number})"


def _metrics(setup: Setup, scored: Scored) -> dict[str, TaskMetric]:
    if scored.result is None:
        raise EvaluationError(scored.error or scored.state)
    return setup.metrics_of(scored.result)


def _score(
    setup: Setup, record: TrialRecord, metrics: Metrics, parents: Sequence[Metrics]
) -> ConfirmScore:
    score = setup.score_of(metrics, parents)
    return ConfirmScore(
        trial=record.number,
        objective=score.value,
        stderr=score.stderr,
        tasks={task: metric.value for task, metric in metrics.items()},
        num_items=sum(metric.num_items for metric in metrics.values()),
    )
