"""`evomerge import GENOME.yml`: a file of mergekit-evolve becomes a search config."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from evomerge.errors import ConfigError

if TYPE_CHECKING:
    from evomerge.config.evolve import EvolveConfig
    from evomerge.config.evolve_import import Shape


@click.command(name="import")
@click.argument("genome", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="File to write; stdout by default.")
@click.option("--name", help="Name of the study; the file's by default.")
@click.option("--evaluations", default=100, show_default=True, help="Candidates to score.")
@click.option("--seconds", type=float, help="Wall time of the search.")
@click.option("--include-path", multiple=True, help="Folder with lm-eval task files. Repeatable.")
@click.option("--base", metavar="MODEL", help="A base to measure against, for linear.")
@click.option("--layers", type=click.IntRange(min=1), help="Layers of models that are not here.")
def import_genome(
    genome: Path,
    out: Path | None,
    name: str | None,
    evaluations: int,
    seconds: float | None,
    include_path: tuple[str, ...],
    base: str | None,
    layers: int | None,
) -> None:
    """Turn GENOME, a file of mergekit-evolve, into a search config that means the same.

    Comments in it say what differs and why. Paths of local models are read from here and written in
    full.
    """
    from evomerge.config.evolve import read_evolve
    from evomerge.config.evolve_import import Run
    from evomerge.config.evolve_import import import_genome as run_import
    from evomerge.config.models import ModelRef, absolute_path
    from evomerge.config.search import make_search
    from evomerge.config.strict import parse_yaml

    evolve, origin = read_evolve(genome)
    evolve = evolve.placed(Path.cwd())
    run = Run(
        name=name or genome.stem,
        evaluations=evaluations,
        seconds=seconds,
        include_path=tuple(str(absolute_path(path, Path.cwd())) for path in include_path),
        base=ModelRef.model_validate(base).relative_to(Path.cwd()) if base else None,
    )
    text = run_import(evolve, origin, _shape_of(evolve, layers), run)
    make_search(*parse_yaml(text, f"{genome} as a search config"))
    if out is None:
        click.echo(text, nl=False)
    else:
        _write(out, text)


def _shape_of(evolve: "EvolveConfig", layers: int | None) -> "Shape | None":
    """Return the tensors of the genome's first model, a Llama's of so many layers, or None."""
    from evomerge.config.evolve_import import Shape, llama_shape

    first = evolve.genome.models[0]
    if not first.is_local:
        return None if layers is None else llama_shape(layers)
    from evomerge.checkpoints.architecture import layout_of
    from evomerge.checkpoints.locate import locate
    from evomerge.checkpoints.reader import open_checkpoint

    names = open_checkpoint(locate(first), str(first)).names()
    return Shape(layout_of(names), tuple(names))


def _write(out: Path, text: str) -> None:
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{out}: is already there. Name another file with --out.") from None
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written ({error.strerror}). Name another file with --out."
        ) from None
    click.echo(f"{out}  written; evomerge check {out} says what would run")
