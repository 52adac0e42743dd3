"""`evomerge check CONFIG`: everything that can be known without running."""

from typing import TYPE_CHECKING, Any

import click

from evomerge.cli.options import json_option, print_json, settings_option

if TYPE_CHECKING:
    from evomerge.study.setup import Setup


@click.command()
@click.argument("config", type=click.Path())
@settings_option
@json_option
def check(config: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Resolve CONFIG: models, shapes, tasks, metrics, items, knobs, optimiser.

    Prints them, or all that is wrong.
    """
    from evomerge.config.search import load_search
    from evomerge.study.setup import prepare

    setup = prepare(load_search(config, settings))
    facts = _facts(setup)
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def _facts(setup: "Setup") -> dict[str, Any]:
    from evomerge.config.suite import ROLES

    config = setup.config
    adapters = {name: ref.adapter for name, ref in config.models.parents.items()}
    adapters["base"] = config.models.base.adapter
    return {
        "study": config.study.name,
        "models": {
            name: f"{folder}+{adapters[name]}" if adapters.get(name) else str(folder)
            for name, folder in setup.folders.items()
        },
        "bytes": setup.num_bytes,
        "layers": setup.layout.num_layers,
        "out_dtype": setup.out_dtype,
        "method": config.merge.method,
        "knobs": setup.space.describe(),
        "proposer": config.proposer.model_dump(mode="json"),
        "tasks": {
            task.name: {
                "metric": task.metric,
                "higher_is_better": task.higher_is_better,
                "weight": task.weight,
                "items": {role: len(setup.tasks.items(role).get(task.name, ())) for role in ROLES},
            }
            for task in setup.tasks.scored
        },
        "examples_per_evaluation": sum(c.num_items for c in setup.tasks.chunks("search")),
        "budget": config.study.budget.model_dump(mode="json"),
    }


def _range_of(knob: dict[str, Any]) -> str:
    if knob["kind"] == "choice":
        return f"one of {', '.join(map(str, knob['choices']))}"
    scale = ", log" if knob["scale"] == "log" else ""
    return f"{knob['kind']}, {knob['low']:g} to {knob['high']:g}{scale}"


def _print(facts: dict[str, Any]) -> None:
    click.echo(f"study {facts['study']}: {facts['method']}, written as {facts['out_dtype']}")
    click.echo(f"\nmodels ({facts['bytes'] / 2**20:,.1f} MiB to read, {facts['layers']} layers)")
    for name, folder in facts["models"].items():
        click.echo(f"  {name:<16} {folder}")
    click.echo(f"\nknobs ({len(facts['knobs'])})")
    for knob in facts["knobs"]:
        click.echo(f"  {knob['name']:<32} {_range_of(knob)}, starts at {knob['initial']}")
    click.echo(f"\ntasks ({facts['examples_per_evaluation']} items per evaluation)")
    for name, task in facts["tasks"].items():
        items = ", ".join(f"{number} {role}" for role, number in task["items"].items())
        better = "higher" if task["higher_is_better"] else "lower"
        click.echo(
            f"  {name:<28} {task['metric']} ({better} is better), "
            f"weight {task['weight']:g}; {items}"
        )
    limits = ", ".join(f"{v:g} {k}" for k, v in facts["budget"].items() if v is not None)
    proposer = facts["proposer"]
    click.echo(
        f"\nproposer {proposer['name']}, population {proposer['population']}; budget {limits}"
    )
    click.echo("nothing is wrong; start it with evomerge search")
