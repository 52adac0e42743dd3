"""`evomerge merge RECIPE.yaml OUT`: carry out one recipe."""

from pathlib import Path

import click


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def merge(recipe: Path, out: Path) -> None:
    """Merge the models that RECIPE (mergekit YAML) names and write the model to the folder OUT."""
    from evomerge.config.mergekit import read_recipe
    from evomerge.merging.run import merge as run_merge

    digest = run_merge(read_recipe(recipe), out)
    click.echo(f"{out}  digest {digest}")
