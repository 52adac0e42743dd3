"""Where a study stands, as plain data.

It is what `evomerge status --json` prints and what progress is drawn from.
"""

from typing import Any

from evomerge.study.ledger import Ledger
from evomerge.study.records import TrialRecord

STATES = ("waiting", "running", "done", "duplicate", "invalid", "failed")


def summarise(name: str, state: str, ledger: Ledger, confirm: Any) -> dict[str, Any]:
    """Describe a study.

    Args:
        name: The study's name.
        state: `running`, `interrupted`, `stopped`, `done`, `exhausted`.
        ledger: Its trials.
        confirm: Scores on the confirm items, None until they were taken.

    Returns:
        Plain data: `study`, `state`, `trials` (per state; baselines included), `evaluations`,
        `best`, `baselines`, `confirm`, `verdict` (None: winners are not tested yet),
        `examples_scored`, `seconds`, `last_error`.
    """
    records = ledger.records
    best = ledger.best
    return {
        "study": name,
        "state": state,
        "trials": {s: sum(record.state == s for record in records) for s in STATES},
        "evaluations": ledger.num_evaluations,
        "best": {"trial": best.number, **scores_of(best)} if best else None,
        "baselines": {
            baseline: {"trial": record.number, **scores_of(record)}
            for baseline, record in ledger.baselines.items()
        },
        "confirm": confirm if _is_of(confirm, best) else None,
        "verdict": None,
        "examples_scored": ledger.num_examples,
        "seconds": ledger.elapsed_s,
        "last_error": _last_error(records),
    }


def scores_of(record: TrialRecord) -> dict[str, Any]:
    """Return a trial's objective and task scores as plain data; None and empty before a result."""
    result = record.result
    return {
        "objective": result.fitness if result else None,
        "stderr": result.stderr if result else None,
        "tasks": {task: score.value for task, score in result.tasks.items()} if result else {},
    }


def _is_of(confirm: Any, best: TrialRecord | None) -> bool:
    """Whether a confirmation is of the present winner; a resumed search may have found a better."""
    return bool(confirm) and best is not None and confirm["winner"]["trial"] == best.number


def _last_error(records: list[TrialRecord]) -> str | None:
    errors = [f"trial {r.number}: {r.result.error}" for r in records if r.result and r.result.error]
    return errors[-1] if errors else None
