"""`evomerge confirm CONFIG|STUDY`: choose and test the winner, on items nothing has used yet."""

import click

from evomerge.cli.options import command_line, config_of, settings_option, study_argument
from evomerge.cli.search import interruption, running


@click.command()
@study_argument
@settings_option
def confirm(study: str, storage: str | None, settings: tuple[str, ...]) -> None:
    """Choose the best of what a study has found so far, and test it against the best parent.

    A search does this by itself when it ends. Each time takes confirm and report items that no
    earlier one has used; of a study that is under way, stop it first.
    """
    from evomerge.study.run import confirm_study

    config = config_of(study, storage, settings)
    again = command_line("confirm", study, storage, settings)
    with running(config, again) as progress, interruption(progress.say) as stop:
        confirm_study(config, observe=progress.show, interrupted=stop.asked)
