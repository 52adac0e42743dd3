"""Measuring: interleaved rounds of process CPU time, ratios within a round, rows that are printed.

The pattern of a benchmark:

    arguments = parser(__doc__).parse_args()
    one_thread()
    rounds = interleaved({"ours": run, "copy": copy_of(num_bytes)}, arguments.rounds)
    show([Row("span", "linear", 3, 1, rounds.ratio("ours", "copy"))], arguments.json)

The machine may be shared. CPU time does not count what others run, but their use of the caches and
of the memory does show; so what is compared runs in turn, is divided within its round, and a ratio
is printed with its extremes.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch

ROUNDS = 7
"""Rounds that a number rests on unless the command line says otherwise."""

UNITS = {
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "B": 10**9,
}
"""What may follow a number of parameters or bytes."""

Run = Callable[[], object]
"""Something to be timed; what it returns is thrown away."""


@dataclass(frozen=True)
class Ratio:
    """The median of ratios, one per round, with the smallest and the largest of them."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Rounds:
    """What everything took in every round.

    Attributes:
        seconds: Name to one number per round.
    """

    seconds: Mapping[str, Sequence[float]]

    def median_s(self, name: str) -> float:
        """Return the median of what one of them took, in seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str, scale: float = 1.0) -> Ratio:
        """Return how many times `scale` times what `to` took this one took, round by round."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        ratios = [ours / max(theirs * scale, 1e-9) for ours, theirs in pairs]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table.

    Attributes:
        case: What was done, in words.
        method: Merge method; empty where none is meant.
        n: Models that are merged, the base not counted.
        k: Candidates in one launch; times and ratios are per candidate.
        x_copy: Multiple of a `copy_` of the bytes; None where that is no measure of it.
        x_mergekit: mergekit's time over ours; None where mergekit was not run.
        device: What it ran on; None is this machine's CPU, one thread.
        more: Further columns, by name; plain data.
    """

    case: str
    method: str
    n: int
    k: int
    x_copy: Ratio | None = None
    x_mergekit: float | None = None
    device: str | None = None
    more: Mapping[str, object] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Return the row as it is written with `--json`."""
        spread = [self.x_copy.low, self.x_copy.high] if self.x_copy else None
        return {
            "case": self.case,
            "method": self.method,
            "n": self.n,
            "k": self.k,
            "x_copy": self.x_copy.median if self.x_copy else None,
            "x_copy_spread": spread,
            "x_mergekit": self.x_mergekit,
            "device": self.device or cpu(),
            "commit": commit(),
            **self.more,
        }


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser that knows `--rounds` and `--json`, with a module's first line as its help.

    Args:
        doc: Docstring of the module.
    """
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--rounds", type=count, default=ROUNDS, help=f"default {ROUNDS}")
    made.add_argument("--json", action="store_true", help="one JSON object per line")
    return made


def count(text: str) -> int:
    """Return a whole number from 1 on, as `argparse` wants it."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return number


def size(text: str) -> int:
    """Return a size such as 64Mi, 0.27B or 4096; for parameters, elements and bytes."""
    for unit, factor in UNITS.items():
        if text.endswith(unit):
            return _whole(text, text.removesuffix(unit), factor)
    return _whole(text, text, 1)


def _whole(text: str, number: str, factor: int) -> int:
    try:
        found = int(float(number) * factor)
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        units = ", ".join(UNITS)
        message = f"{text}: not a size; write a number, with or without one of {units}"
        raise argparse.ArgumentTypeError(message)
    return found


def one_thread() -> None:
    """Let torch use one thread from now on; CPU times of several cannot be compared."""
    torch.set_num_threads(1)


def cpu_seconds(run: Run) -> float:
    """Return the CPU time of all threads of this process that a call took."""
    start = time.process_time()
    run()
    return time.process_time() - start


def interleaved(
    runs: Mapping[str, Run], rounds: int = ROUNDS, clock: Callable[[Run], float] = cpu_seconds
) -> Rounds:
    """Time everything once in each round, after a round that is not counted.

    Each round begins with the next one, so that what ran before does not always favour the same.

    Args:
        runs: Name to what is timed.
        rounds: How many rounds count.
        clock: Runs and times one of them, in seconds.
    """
    names = list(runs)
    for name in names:
        runs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(clock(runs[name]))
    return Rounds(seconds)


def copy_of(num_bytes: int) -> Run:
    """Return a copy that moves this many bytes: it reads one half of them, and writes the other.

    Args:
        num_bytes: All that the work read and wrote, once.
    """
    source = torch.full((max(1, num_bytes // 2),), 1, dtype=torch.uint8)
    target = torch.zeros_like(source)
    target.fill_(2)
    return partial(target.copy_, source)


@cache
def commit() -> str | None:
    """Return the commit of this checkout, ending in -dirty where files differ; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        run = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


@cache
def cpu() -> str:
    """Return what this machine's processor is called, for the column `device`."""
    lines = _lines(Path("/proc/cpuinfo"))
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"cpu ({names[0] if names else platform.machine()}), 1 thread"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def show(rows: Iterable[Row], as_json: bool) -> None:
    """Print rows as they come as JSON, one object per line, or all of them as a Markdown table."""
    if as_json:
        for row in rows:
            print(json.dumps(row.as_dict()), flush=True)
        return
    print_table([_cells(row) for row in rows])


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print a Markdown table with the rows' keys as columns, but for columns without a text."""
    names = list(dict.fromkeys(name for row in rows for name in row if row[name]))
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    for line in lines:
        print(f"| {' | '.join(line)} |", flush=True)


def _cells(row: Row) -> dict[str, str]:
    copies = row.x_copy
    spread = f"{copies.median:.2f} ({copies.low:.2f} to {copies.high:.2f})" if copies else ""
    first = {"case": row.case, "method": row.method, "n": str(row.n), "k": str(row.k)}
    return {**first, "x copy": spread, "x mergekit": _text(row.x_mergekit), **_more(row)}


def _more(row: Row) -> dict[str, str]:
    return {name.replace("_", " "): _text(value) for name, value in row.more.items()}


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)
