"""Where a study stands, as plain data.

It is what `evomerge status --json` prints and what progress is drawn from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from evomerge.evaluate.verdict import Verdict
from evomerge.study.baselines import RANDOM_STEP, main_baselines
from evomerge.study.confirmation import MEAN, TRIAL, Confirmation
from evomerge.study.ledger import Ledger
from evomerge.study.records import TrialRecord
from evomerge.study.setup import Setup

STATES = ("waiting", "running", "done", "stopped", "duplicate", "invalid", "failed")


def notes_of(setup: Setup) -> dict[str, Any]:
    """Return what a study keeps of its set-up to be told with its results, as plain data.

    These are `leakage`, a sentence for each leak that the suite allows, and `skipped_baselines`,
    the reason for each baseline that is no merge of the models.
    """
    return {
        "leakage": list(setup.tasks.leakage),
        "skipped_baselines": dict(setup.unfit_baselines),
    }


def sentences_of(notes: Mapping[str, Any]) -> list[str]:
    """Return what `notes_of`, or a summary, has to tell people."""
    skipped = notes["skipped_baselines"].items()
    return [
        *(f"leakage: {sentence}" for sentence in notes["leakage"]),
        *(f"without the baseline {name}: {reason}" for name, reason in skipped),
    ]


def summarise(
    name: str,
    state: str,
    ledger: Ledger,
    confirmed: Sequence[Confirmation] = (),
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe a study.

    Args:
        name: The study's name.
        state: `running`, `interrupted`, `stopped`, `done`, `exhausted`.
        ledger: Its trials.
        confirmed: Its confirmations.
        notes: As of `notes_of`; None for a study of an earlier version.

    Returns:
        Plain data: `study`, `state`, `trials` (per state; baselines included), `evaluations`,
        `best`, `baselines`, `not_beaten` (a sentence where the search is no better than the best
        of them, else None), `skipped_baselines` (name → reason), `confirm` (the last confirmation's
        scores by name, its `winner` first), `verdict` (the test of that winner; None where there
        was none), `no_verdict` (a sentence that says why, else None), `outdated` (a sentence where
        the search has gone on since, else None), `confirmations` (their number), `leakage` (a
        sentence each), `examples_scored`, `seconds`, `last_error`.
    """
    records = ledger.records
    best = ledger.best
    shown = {
        name: record
        for name, record in ledger.baselines.items()
        if not name.startswith((RANDOM_STEP, MEAN))
    } | main_baselines(ledger.baselines)
    baselines = {
        baseline: {"trial": record.number, **scores_of(record)}
        for baseline, record in shown.items()
    }
    winner = {"trial": best.number, **scores_of(best)} if best else None
    last = confirmed[-1] if confirmed else None
    confirm = _confirm(last) if last else None
    skipped = dict(notes["skipped_baselines"]) if notes else {}
    return {
        "study": name,
        "state": state,
        "trials": {s: sum(record.state == s for record in records) for s in STATES},
        "evaluations": ledger.num_evaluations,
        "best": winner,
        "baselines": baselines,
        "not_beaten": _not_beaten(winner, baselines, confirm),
        "skipped_baselines": skipped | _failed_baselines(shown),
        "confirm": confirm,
        "verdict": _verdict(last.verdict) if last and last.verdict else None,
        "no_verdict": last.no_verdict if last else None,
        "outdated": _outdated(last, ledger) if last else None,
        "confirmations": len(confirmed),
        "leakage": list(notes["leakage"]) if notes else [],
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


def _not_beaten(
    winner: Mapping[str, Any] | None, baselines: Mapping[str, Any], confirm: Any
) -> str | None:
    """Return a sentence where some baseline is as good as the winner; None where none is.

    Compared on the confirm items once they are scored: the winner was chosen on the search items.
    """
    if winner is None:
        return None
    items, best = "search", winner["objective"]
    if confirm:
        found = {name: scores for name, scores in confirm.items() if name != "winner"}
        baselines = {n: s for n, s in found.items() if not n.startswith((TRIAL, MEAN))}
        found = {n: s for n, s in found.items() if n.startswith((TRIAL, MEAN))}
        if not found:
            return None
        items, winner = "confirm", max(found.values(), key=lambda scores: scores["objective"])
        best = winner["objective"]
    known = {n: s["objective"] for n, s in baselines.items() if s["objective"] is not None}
    if not known or max(known.values()) < best:
        return None
    first = max(known, key=lambda name: known[name])
    return (
        f"The search does not beat its baselines: on the {items} items {first} has "
        f"{known[first]:.4f}, trial {winner['trial']} has {best:.4f}."
    )


def _failed_baselines(baselines: Mapping[str, TrialRecord]) -> dict[str, str]:
    return {
        name: record.result.error or record.state
        for name, record in baselines.items()
        if record.result and record.result.fitness is None
    }


def _confirm(confirmation: Confirmation) -> dict[str, Any]:
    scores = {name: asdict(score) for name, score in confirmation.scores.items()}
    winner = {"name": confirmation.winner, **scores[confirmation.winner]}
    return {"winner": winner, **scores}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "outcome": verdict.outcome,
        "sentence": verdict.sentence,
        "optimism": verdict.optimism,
        "parent_optimism": verdict.parent_optimism,
        **verdict.to_json(),
    }


def _outdated(confirmation: Confirmation, ledger: Ledger) -> str | None:
    newer = ledger.num_tells - confirmation.num_tells
    if not newer:
        return None
    return (
        f"The search has gone on since its last confirmation, {newer} candidates; they are "
        "confirmed when it ends, on items that are not used yet, if any are left."
    )


def _last_error(records: list[TrialRecord]) -> str | None:
    errors = [f"trial {r.number}: {r.result.error}" for r in records if r.result and r.result.error]
    return errors[-1] if errors else None
