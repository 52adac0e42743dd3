"""Export what a search found: a recipe as mergekit YAML, and the very weights that were scored."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from evomerge.config.mergekit import write_recipe
from evomerge.errors import CheckpointError, StudyError
from evomerge.merging.run import merge
from evomerge.study.records import TrialRecord
from evomerge.study.view import StudyView


@dataclass(frozen=True)
class Exported:
    """One exported trial.

    Attributes:
        trial: Its number.
        objective: What it scored on the search items.
        recipe_path: The YAML file.
        weights_path: The model's folder; None when only the recipe was wanted.
        digest: Digest of the weights, equal to the one that was scored; None without weights.
    """

    trial: int
    objective: float
    recipe_path: Path
    weights_path: Path | None
    digest: str | None


def export_trial(
    view: StudyView, record: TrialRecord, recipe_path: Path, weights_path: Path | None
) -> Exported:
    """Write a trial's recipe, and its weights if wanted.

    Args:
        view: The study.
        record: A scored trial.
        recipe_path: YAML file to write.
        weights_path: Folder to write the model to; must not exist or be empty.

    Raises:
        StudyError: The trial was not scored, or the written weights are not the scored ones.
        CheckpointError: Files cannot be written; nothing half-written stays.
    """
    result = record.result
    if result is None or result.fitness is None:
        raise StudyError(
            f"study {view.name!r}: trial {record.number} is {record.state} and has no score. "
            "Export a trial that is done."
        )
    digest = None
    if weights_path is not None:
        digest = merge(record.recipe, weights_path)
        _check_digest(view, record, digest, weights_path)
    _write_text(recipe_path, _heading(view, record) + write_recipe(record.recipe))
    return Exported(record.number, result.fitness, recipe_path, weights_path, digest)


def _check_digest(view: StudyView, record: TrialRecord, digest: str, folder: Path) -> None:
    scored = record.result.digest if record.result else None
    if digest != scored:
        shutil.rmtree(folder)
        raise StudyError(
            f"study {view.name!r}: the weights of trial {record.number} come out as {digest[:12]}, "
            f"scored were {str(scored)[:12]}. The model files or the versions of torch changed "
            "since; nothing was exported."
        )


def _heading(view: StudyView, record: TrialRecord) -> str:
    assert record.result is not None, "only scored trials are exported"
    scores = ", ".join(f"{task} {s.value:.4f}" for task, s in record.result.tasks.items())
    lines = [
        f"Trial {record.number} of the evomerge study {view.name!r}.",
        f"Objective on the search items: {record.result.fitness:.4f} ({scores}).",
        *_judged(view, record),
        *(f"Leakage: {sentence}" for sentence in view.summary["leakage"]),
    ]
    return "".join(f"# {line}\n" for line in lines)


def _judged(view: StudyView, record: TrialRecord) -> list[str]:
    """Return what the last confirmation says of a trial, if it chose that one."""
    confirmed = view.confirmations
    if not confirmed or confirmed[-1].trial != record.number:
        return []
    last = confirmed[-1]
    score = last.scores[last.winner].objective
    said = f"Verdict: {last.verdict.sentence}." if last.verdict else str(last.no_verdict)
    return [f"Objective on the confirm items, unseen by the search: {score:.4f}.", said]


def _write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror}). Choose another place with --out."
        ) from None
