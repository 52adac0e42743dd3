"""Options that several commands share, and how a study is named on the command line."""

import json
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from evomerge.config.search import SearchConfig

Function = TypeVar("Function", bound=Callable[..., Any])


def settings_option(function: Function) -> Function:
    """Add `--set dotted.path=value`."""
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Change a setting of the config, e.g. --set study.budget.evaluations=100. Repeatable.",
    )(function)


def json_option(function: Function) -> Function:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")(
        function
    )


def study_argument(function: Function) -> Function:
    """Add the argument STUDY and the option `--storage`."""
    function = click.option(
        "--storage",
        metavar="URL",
        help="Where STUDY is stored: a journal file or a SQLAlchemy URL. STUDY is then a name.",
    )(function)
    return click.argument("study", metavar="CONFIG|STUDY")(function)


def config_of(study: str, storage: str | None, settings: tuple[str, ...] = ()) -> "SearchConfig":
    """Return the config behind CONFIG, or behind STUDY in a storage."""
    from evomerge.study.run import find_config

    return find_config(study, storage, settings)


def command_line(command: str, study: str, storage: str | None, settings: tuple[str, ...]) -> str:
    """Return a command about a study as it would be typed."""
    place = ["--storage", storage] if storage else []
    changes = [part for setting in settings for part in ("--set", setting)]
    return shlex.join(["evomerge", command, study, *place, *changes])


def print_json(data: Any) -> None:
    """Print plain data on stdout."""
    click.echo(json.dumps(data, indent=2))
