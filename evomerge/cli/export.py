"""`evomerge export CONFIG|STUDY`: what a search found, as YAML and as a model."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from evomerge.cli.options import config_of, json_option, print_json, settings_option, study_argument

if TYPE_CHECKING:
    from evomerge.study.export import Exported


@click.command()
@study_argument
@click.option("--trial", type=int, help="Export this trial instead of the winner.")
@click.option("--top", type=click.IntRange(min=1), help="Export the best K trials.", metavar="K")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the YAML files [default: FOLDER/export].",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="Write the merged model to this folder (with --top: one folder per trial inside it).",
)
@settings_option
@json_option
def export(
    study: str,
    storage: str | None,
    trial: int | None,
    top: int | None,
    out: Path | None,
    weights: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write the winner as a YAML that mergekit replays, and with --weights as a model.

    The winner is what the last confirmation chose; before the first, the best on the search items.
    The weights are those that were scored, bit for bit: their digest is compared with the stored
    one.
    """
    if trial is not None and top is not None:
        raise click.UsageError("--trial and --top exclude each other.")
    from evomerge.study.export import export_trial
    from evomerge.study.view import StudyView

    view = StudyView(config_of(study, storage, settings))
    if top is not None:
        records = view.ledger.ranked()[:top] or [view.best]
    else:
        records = [view.winner if trial is None else view.trial(trial)]
    folder = out or Path(view.config.study.folder) / "export"
    exported = []
    for record in records:
        name = f"trial-{record.number:05d}"
        place = weights / name if weights and top is not None else weights
        exported.append(export_trial(view, record, folder / f"{name}.yaml", place))
    _print(exported, as_json)


def _print(exported: "list[Exported]", as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {
                    "trial": e.trial,
                    "objective": e.objective,
                    "recipe": str(e.recipe_path),
                    "weights": str(e.weights_path) if e.weights_path else None,
                    "digest": e.digest,
                }
                for e in exported
            ]
        )
        return
    for e in exported:
        click.echo(f"trial {e.trial} (objective {e.objective:.4f}): {_short(e.recipe_path)}")
        if e.weights_path:
            click.echo(f"  weights, equal to the scored ones: {_short(e.weights_path)}")


def _short(path: Path) -> Path:
    """Return a path from here where it lies below here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
