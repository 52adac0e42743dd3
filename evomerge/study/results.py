"""Results: what came back from the workers, as trials remember it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from evomerge.errors import EvaluationError
from evomerge.evaluate.evaluator import TaskMetric
from evomerge.study.records import TrialRecord, TrialResult
from evomerge.study.schedule import Scored
from evomerge.study.setup import Setup

Metrics = Mapping[str, TaskMetric]
"""The chosen metric of each task."""


def result_of(setup: Setup, scored: Scored, parents: Sequence[Metrics]) -> TrialResult:
    """Return what came of a candidate: its score and cost, or why it has no score.

    Args:
        setup: The search.
        scored: What came back.
        parents: Metrics of each parent on the same items, for parent-relative objectives.
    """
    cost = TrialResult(
        state="failed",
        examples=sum(len(t.ids) for chunk in scored.chunks for t in chunk.result.values()),
        seconds_merge=round(sum(chunk.seconds_merge for chunk in scored.chunks), 6),
        seconds_score=round(sum(chunk.seconds_score for chunk in scored.chunks), 6),
        worker=",".join(sorted({chunk.worker for chunk in scored.chunks})),
        kernels=",".join(sorted({name for chunk in scored.chunks for name in chunk.kernels})),
        attempt=scored.attempt,
    )
    if scored.result is None:
        return replace(cost, state=scored.state, error=scored.error)
    try:
        metrics = setup.metrics_of(scored.result)
        if scored.state == "stopped":
            digest = scored.chunks[0].digest
            return replace(cost, state="stopped", tasks=metrics, digest=digest)
        score = setup.score_of(metrics, parents)
    except EvaluationError as error:
        return replace(cost, error=str(error))
    return replace(
        cost,
        state="done",
        fitness=score.value,
        stderr=score.stderr,
        tasks=metrics,
        digest=scored.chunks[0].digest,
    )


def retold(original: TrialRecord) -> TrialResult:
    """Return the result of a merge that was scored before as a duplicate's own; it cost nothing.

    A duplicate of one that racing stopped is stopped.

    Args:
        original: The earlier trial of the merge, recorded.
    """
    first = original.result
    assert first is not None, "the original is recorded before its duplicate"
    if first.state == "stopped":
        return TrialResult(
            "stopped", tasks=first.tasks, digest=first.digest, duplicate_of=original.number
        )
    if first.fitness is None:
        reason = f"same merge as trial {original.number}: {first.error}"
        return TrialResult(first.state, error=reason, duplicate_of=original.number)
    return TrialResult(
        state="duplicate",
        fitness=first.fitness,
        stderr=first.stderr,
        tasks=first.tasks,
        digest=first.digest,
        duplicate_of=original.number,
    )
