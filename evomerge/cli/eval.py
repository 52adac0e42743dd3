"""`evomerge eval MODEL|RECIPE --suite CONFIG`: score one as a search scores its candidates."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from evomerge.cli.options import json_option, print_json, settings_option

if TYPE_CHECKING:
    from evomerge.config.recipe import Recipe
    from evomerge.config.suite import ItemRole


@click.command("eval")
@click.argument("model", metavar="MODEL|RECIPE.yaml")
@click.option(
    "--suite", "config", required=True, help="Search config whose suite is asked.", metavar="CONFIG"
)
@click.option(
    "--role",
    type=click.Choice(["search", "confirm", "report"]),
    default="confirm",
    show_default=True,
    help="Which items.",
)
@settings_option
@json_option
def eval_model(
    model: str, config: str, role: "ItemRole", settings: tuple[str, ...], as_json: bool
) -> None:
    """Score MODEL (a folder or hub id), or what RECIPE.yaml makes, on the items of one role.

    It runs in this process, with lm-eval's tasks. A recipe is merged in memory; nothing is written.
    """
    from evomerge.config.mergekit import read_recipe
    from evomerge.config.models import ModelRef
    from evomerge.config.search import load_search, place_problems
    from evomerge.errors import ConfigError
    from evomerge.workers.score_model import score_model

    loaded = load_search(config, settings)
    if model.endswith((".yaml", ".yml")):
        scored: ModelRef | Recipe = read_recipe(model)
    else:
        scored = ModelRef.model_validate(model).relative_to(Path.cwd())
    device = "cuda" if loaded.workers.gpus > 0 else "cpu"
    try:
        scores = score_model(scored, loaded.suite, role, cpus=loaded.workers.cpus, device=device)
    except ConfigError as error:
        raise place_problems(error, loaded.origin) from None
    if as_json:
        metrics = {
            task: {
                key: {"value": m.value, "stderr": m.stderr, "num_items": m.num_items}
                for key, m in keys.items()
            }
            for task, keys in scores.metrics.items()
        }
        print_json({"model": model, "role": role, "digest": scores.digest, "tasks": metrics})
        return
    for task, keys in scores.metrics.items():
        for key, metric in keys.items():
            stderr = f" +- {metric.stderr:.4f}" if metric.stderr is not None else ""
            click.echo(
                f"{task:<28} {key:<24} {metric.value:.4f}{stderr}  ({metric.num_items} items)"
            )
