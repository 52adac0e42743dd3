"""`evomerge resume CONFIG|STUDY`: go on with a search."""

import click

from evomerge.cli.options import command_line, config_of, settings_option, study_argument
from evomerge.cli.search import run_and_report


@click.command()
@study_argument
@settings_option
def resume(study: str, storage: str | None, settings: tuple[str, ...]) -> None:
    """Go on with a search that was stopped, was killed, or has a larger budget now.

    Finished trials stand as they are; open ones are taken up under their numbers. Only budget,
    workers and storage place may differ from what the study was started with.
    """
    config = config_of(study, storage, settings)
    run_and_report(config, resume=True, again=command_line("resume", study, storage, settings))
