"""Progress of a search on stderr: one live block on a terminal, a line per generation elsewhere."""

import sys
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from evomerge.config.search import SearchConfig


class Progress:
    """Draws a study's summary whenever it changes; use as a context manager.

    Args:
        config: The search, for its budget and tasks.
    """

    def __init__(self, config: SearchConfig) -> None:
        self._budget = config.study.budget
        self._population = config.proposer.population
        self._console = Console(stderr=True)
        self._live = (
            Live(console=self._console, auto_refresh=False) if sys.stderr.isatty() else None
        )
        self._printed = -1

    def __enter__(self) -> "Progress":
        self._console.print("preparing models, tasks and workers …", highlight=False)
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, highlight=False)

    def show(self, summary: dict[str, Any]) -> None:
        """Draw a summary."""
        lines = self._lines(summary)
        if self._live:
            self._live.update(Group(*map(Text, lines)), refresh=True)
            return
        finished = sum(n for s, n in summary["trials"].items() if s not in ("waiting", "running"))
        if (
            finished // self._population != self._printed // self._population
            or summary["state"] != "running"
        ):
            self._printed = finished
            line = " | ".join(lines)
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _lines(self, summary: dict[str, Any]) -> list[str]:
        trials = summary["trials"]
        done = f"{summary['evaluations']}"
        goal = f"/{self._budget.evaluations}" if self._budget.evaluations else ""
        failures = trials["failed"] + trials["invalid"]
        head = f"{done}{goal} candidates asked, {trials['waiting'] + trials['running']} open"
        head += f", {trials['duplicate']} duplicates" if trials["duplicate"] else ""
        head += f", {trials['stopped']} stopped early" if trials["stopped"] else ""
        head += f", {failures} failed (last: {summary['last_error']})" if failures else ""
        return [head, self._best_line(summary), self._pace_line(summary)]

    def _best_line(self, summary: dict[str, Any]) -> str:
        parents = [
            b["objective"] for n, b in summary["baselines"].items() if n.startswith("parent:")
        ]
        known = [p for p in parents if p is not None]
        parent = f"best parent {max(known):.4f}" if known else "scoring baselines"
        if not summary["best"]:
            return parent
        best = summary["best"]
        tasks = ", ".join(f"{task} {value:.3f}" for task, value in best["tasks"].items())
        return f"best {best['objective']:.4f} (trial {best['trial']}: {tasks}); {parent}"

    def _pace_line(self, summary: dict[str, Any]) -> str:
        seconds = summary["seconds"]
        pace = summary["examples_scored"] / max(seconds, 1e-9)
        text = f"{pace:,.0f} items/s, {seconds:.0f} s so far"
        if summary["state"] != "running":
            return f"{text}, {summary['state']}"
        return f"{text}{self._left(summary)}"

    def _left(self, summary: dict[str, Any]) -> str:
        seconds = summary["seconds"]
        open_trials = summary["trials"]["waiting"] + summary["trials"]["running"]
        shares = []
        if self._budget.evaluations:
            shares.append((summary["evaluations"] - open_trials) / self._budget.evaluations)
        if self._budget.examples:
            shares.append(summary["examples_scored"] / self._budget.examples)
        if self._budget.seconds:
            shares.append(seconds / self._budget.seconds)
        share = max(shares, default=0.0)
        if share <= 0.0:
            return ""
        return f", about {max(seconds / min(share, 1.0) - seconds, 0.0):.0f} s left"
