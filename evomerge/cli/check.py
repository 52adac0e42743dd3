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
    from evomerge.config.mergekit import OWN_SETTINGS
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
        "settings": config.merge.model_dump(include=set(OWN_SETTINGS), exclude_defaults=True),
        "knobs": setup.space.describe(),
        "findings": [
            {"knobs": list(finding.knobs), "sentence": finding.sentence}
            for finding in setup.findings
        ],
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
        "confirmation": {
            role: sum(c.num_items for c in setup.tasks.chunks(role))
            for role in ("confirm", "report")
        },
        "baselines": _baselines(setup),
        "leakage": list(setup.tasks.leakage),
        "budget": config.study.budget.model_dump(mode="json"),
        "memory": _memory(setup),
        "kernels": _kernels(setup),
    }


def _baselines(setup: "Setup") -> dict[str, Any]:
    from evomerge.study.baselines import RANDOM, num_evaluations

    asked, evaluations = setup.config.study.baselines, num_evaluations(setup)
    return {
        "names": ["base", "parents", *(n for n in asked if n not in setup.unfit_baselines)],
        "skipped": dict(setup.unfit_baselines),
        "evaluations": evaluations,
        "items": evaluations * sum(c.num_items for c in setup.tasks.chunks("search")),
        "random_search": RANDOM in asked,
    }


def _kernels(setup: "Setup") -> dict[str, str | None]:
    from evomerge.kernels.dispatch import for_device

    name, why_not = for_device("cuda" if setup.config.workers.gpus else "cpu")
    return {"name": name, "why_no_faster": why_not}


def _memory(setup: "Setup") -> dict[str, Any]:
    import torch

    from evomerge.adapters.open import open_model
    from evomerge.merging.memory import gpu_memory, host_memory, memory_plan, needs_of

    workers, template = setup.config.workers, setup.template
    refs = dict(template.parents)
    if template.base is not None and template.base not in refs.values():
        refs = {"base": template.base, **refs}
    models = {name: open_model(ref) for name, ref in refs.items()}
    dtype = getattr(torch, setup.out_dtype)
    needs = needs_of(models, next(iter(models)), dtype, template.merge_method)
    host, gpu = host_memory(), gpu_memory() if workers.gpus else None
    plan = memory_plan(needs, workers.count, workers.gpus, host, gpu)
    memory = gpu if workers.gpus else host
    return {
        "device": "GPU" if workers.gpus else "CPU",
        "free_bytes": memory and memory.free_bytes,
        "workers": workers.count,
        "source_bytes": dict(needs.source_bytes),
        "live_bytes": needs.live_bytes,
        "table_bytes": needs.table_bytes,
        "left_bytes": plan.left_bytes,
        "choice": plan.choice,
        "pinned": plan.pinned,
        "streaming_s": plan.streaming_s,
        "why": plan.why,
    }


def _range_of(knob: dict[str, Any]) -> str:
    if knob["kind"] == "choice":
        return f"one of {', '.join(map(str, knob['choices']))}"
    scale = ", log" if knob["scale"] == "log" else ""
    return f"{knob['kind']}, {knob['low']:g} to {knob['high']:g}{scale}"


def _print(facts: dict[str, Any]) -> None:
    settings = "".join(f", {name}: {value}" for name, value in facts["settings"].items())
    click.echo(
        f"study {facts['study']}: {facts['method']}, written as {facts['out_dtype']}{settings}"
    )
    click.echo(f"\nmodels ({facts['bytes'] / 2**20:,.1f} MiB to read, {facts['layers']} layers)")
    for name, folder in facts["models"].items():
        click.echo(f"  {name:<16} {folder}")
    click.echo(f"\nknobs ({len(facts['knobs'])})")
    for knob in facts["knobs"]:
        click.echo(f"  {knob['name']:<32} {_range_of(knob)}, starts at {knob['initial']}")
    for finding in facts["findings"]:
        click.echo(f"  warning: {finding['sentence']}")
    click.echo(f"\ntasks ({facts['examples_per_evaluation']} items per evaluation)")
    for name, task in facts["tasks"].items():
        items = ", ".join(f"{number} {role}" for role, number in task["items"].items())
        better = "higher" if task["higher_is_better"] else "lower"
        click.echo(
            f"  {name:<28} {task['metric']} ({better} is better), "
            f"weight {task['weight']:g}; {items}"
        )
    _print_memory(facts["memory"])
    kernels = facts["kernels"]
    slow = f", right but slow: {kernels['why_no_faster']}" if kernels["why_no_faster"] else ""
    click.echo(f"  merge kernels {kernels['name']}{slow}")
    _print_baselines(facts["baselines"])
    for sentence in facts["leakage"]:
        click.echo(f"  leakage: {sentence}")
    click.echo(_confirmation(**facts["confirmation"]))
    limits = ", ".join(f"{v:g} {k}" for k, v in facts["budget"].items() if v is not None)
    proposer = facts["proposer"]
    click.echo(
        f"\nproposer {proposer['name']}, population {proposer['population']}; budget {limits}"
    )
    wrong = "see the warnings" if facts["findings"] else "nothing is wrong"
    click.echo(f"{wrong}; start it with evomerge search")


def _confirmation(confirm: int, report: int) -> str:
    if not confirm:
        return "\nno confirmation: give suite.items.confirm a count, or the winner is unconfirmed"
    chosen = f"\nconfirmation: the winner is chosen on {confirm:,} items"
    if report:
        return f"{chosen}, and tested against the best parent on {report:,} others"
    return f"{chosen}; no verdict without report items: give suite.items.report a count"


def _print_baselines(facts: dict[str, Any]) -> None:
    random = ", and with random search as many as the search" if facts["random_search"] else ""
    click.echo(
        f"\nbaselines, on top of the budget ({facts['items']:,} items in at most "
        f"{facts['evaluations']} evaluations{random})"
    )
    click.echo(f"  {', '.join(facts['names'])}")
    for name, reason in facts["skipped"].items():
        click.echo(f"  without {name}: {reason}")


def _print_memory(facts: dict[str, Any]) -> None:
    from evomerge.merging.memory import gib

    free, live, tables, left = (
        "unknown" if facts[key] is None else gib(facts[key])
        for key in ("free_bytes", "live_bytes", "table_bytes", "left_bytes")
    )
    workers = "the worker" if facts["workers"] == 1 else f"all {facts['workers']} workers"
    models = ", ".join(
        f"{name} {gib(num_bytes)}" for name, num_bytes in facts["source_bytes"].items()
    )
    click.echo(f"\nmemory, with {workers} on this machine ({facts['device']}, {free} free)")
    click.echo(f"  {'sources':<28} {gib(sum(facts['source_bytes'].values()))}: {models}")
    click.echo(f"  {'live model':<28} {live} for each worker")
    click.echo(f"  {'tables of the method':<28} {tables} for each worker")
    click.echo(f"  {'left for activations':<28} {left} for each worker")
    choice = facts["choice"]
    known = {"unknown": "not known yet", "too large": "models too large"}
    click.echo(f"  {known.get(choice, f'sources {choice}')}: {facts['why']}")
