"""`evomerge search CONFIG`: run a search."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from evomerge.cli.options import command_line, settings_option
from evomerge.errors import InterruptedStudy

if TYPE_CHECKING:
    from evomerge.cli.progress import Progress
    from evomerge.config.search import SearchConfig


@click.command()
@click.argument("config", type=click.Path())
@settings_option
def search(config: str, settings: tuple[str, ...]) -> None:
    """Run the search that CONFIG describes.

    Every trial is stored before the search goes on, so it can be stopped (Ctrl-C) or killed at any
    moment and continued with evomerge resume.
    """
    from evomerge.config.search import load_search

    run_and_report(
        load_search(config, settings),
        resume=False,
        again=command_line("resume", config, None, settings),
    )


def run_and_report(config: "SearchConfig", *, resume: bool, again: str) -> None:
    """Run a search under a progress display, then print where it stands.

    Args:
        config: The search.
        resume: Whether the study exists.
        again: The command that goes on with it.
    """
    from evomerge.study.run import run_search

    with running(config, again) as progress, interruption(progress.say) as stop:
        run_search(
            config,
            resume=resume,
            observe=progress.show,
            interrupted=stop.asked,
            warn=progress.say,
        )


@contextmanager
def running(config: "SearchConfig", again: str) -> Iterator["Progress"]:
    """Show the progress of a study, then print where it stands.

    Args:
        config: The search.
        again: The command that goes on with it when it is stopped.
    """
    from evomerge.cli.progress import Progress
    from evomerge.cli.status import print_summary
    from evomerge.study.view import StudyView

    try:
        with Progress(config) as progress:
            yield progress
    except InterruptedStudy as error:
        raise InterruptedStudy(f"{error} Go on with: {again}") from None
    print_summary(StudyView(config).summary)


class _Stop:
    """Whether Ctrl-C was pressed."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._asked = False
        self._searching = False
        self._say = say

    def asked(self) -> bool:
        """Return whether the user wants to stop; the search asks between jobs."""
        self._searching = True
        return self._asked

    def ask(self, signum: int, frame: object) -> None:
        """Stop after the jobs at hand; pressed again, or during set-up, stop at once."""
        if self._asked or not self._searching:
            raise KeyboardInterrupt
        self._asked = True
        self._say("stopping after the chunk at hand; press Ctrl-C again to stop at once")


@contextmanager
def interruption(say: Callable[[str], None]) -> Iterator[_Stop]:
    """Take Ctrl-C as the wish to stop so that the study can go on later."""
    stop = _Stop(say)
    before = {s: signal.signal(s, stop.ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
