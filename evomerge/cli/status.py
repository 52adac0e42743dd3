"""`evomerge status CONFIG|STUDY`: where a search stands."""

from typing import Any

import click

from evomerge.cli.options import config_of, json_option, print_json, settings_option, study_argument


@click.command()
@study_argument
@settings_option
@json_option
def status(study: str, storage: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Print where a search stands; it may be running."""
    from evomerge.study.view import StudyView

    summary = StudyView(config_of(study, storage, settings)).summary
    if as_json:
        print_json(summary)
    else:
        print_summary(summary)


def print_summary(summary: dict[str, Any]) -> None:
    """Print a study's summary for people."""
    from evomerge.study.summary import sentences_of

    trials = {state: number for state, number in summary["trials"].items() if number}
    counts = ", ".join(f"{number} {state}" for state, number in trials.items()) or "no trials yet"
    click.echo(f"study {summary['study']}: {summary['state']}; {counts}")
    click.echo(
        f"{summary['examples_scored']:,} items scored in {summary['seconds']:.0f} s of search"
    )
    rows = [(name, scores) for name, scores in summary["baselines"].items()]
    if summary["best"]:
        rows.append((f"best: trial {summary['best']['trial']}", summary["best"]))
    if rows:
        _print_scores("search items", rows)
    if summary["confirm"]:
        _print_scores("confirm items, unseen by the search", list(summary["confirm"].items()))
    for sentence in judgement_of(summary):
        click.echo(f"\n{sentence}")
    for sentence in sentences_of(summary):
        click.echo(sentence)
    if summary["last_error"]:
        click.echo(f"last failure: {summary['last_error']}")


def judgement_of(summary: dict[str, Any]) -> list[str]:
    """Return what is to be said of the winner, in sentences."""
    said = []
    if verdict := summary["verdict"]:
        optimism, parents = 100 * verdict["optimism"], 100 * verdict["parent_optimism"]
        said.append(
            f"verdict: {verdict['sentence']}\n"
            f"  {verdict['winner']}: {verdict['winner_search']:.4f} on search items, "
            f"{verdict['winner_report']:.4f} on report items, so {optimism:.1f} points of optimism "
            f"(the parent's: {parents:.1f})"
        )
    others = (summary["no_verdict"], summary["outdated"], summary["not_beaten"])
    return [*said, *(sentence for sentence in others if sentence)]


def _print_scores(title: str, rows: list[tuple[str, dict[str, Any]]]) -> None:
    tasks = list(dict.fromkeys(task for _, scores in rows for task in scores["tasks"]))
    width = max(len(name) for name, _ in [*rows, (title, {})])
    click.echo(f"\n{title:<{width}}  objective          " + "  ".join(tasks))
    for name, scores in rows:
        cells = "  ".join(f"{_number(scores['tasks'].get(t)):>{len(t)}}" for t in tasks)
        click.echo(f"{name:<{width}}  {_with_error(scores):<18} {cells}")


def _with_error(scores: dict[str, Any]) -> str:
    error = f" +- {scores['stderr']:.4f}" if scores["stderr"] is not None else ""
    return f"{_number(scores['objective'])}{error}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
