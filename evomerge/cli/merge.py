"""`evomerge merge RECIPE.yaml OUT`: carry out one recipe."""

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from evomerge.cli.options import json_option, print_json

if TYPE_CHECKING:
    from evomerge.config.recipe import Recipe
    from evomerge.merging.folder import Progress

GIB = 2**30
DEFAULT_SHARD_GIB = 5.0


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--shard-gib",
    type=click.FloatRange(min=0, min_open=True),
    default=DEFAULT_SHARD_GIB,
    show_default=True,
    help="Most GiB of tensors in one file.",
)
@click.option(
    "--adapter",
    "as_adapter",
    is_flag=True,
    help="Write one LoRA adapter (PEFT's format) instead of a full model.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="With --adapter: cut larger ranks by singular values.",
)
@json_option
def merge(
    recipe: Path, out: Path, shard_gib: float, as_adapter: bool, rank: int | None, as_json: bool
) -> None:
    """Merge the models that RECIPE (mergekit YAML) names and write the model to the folder OUT.

    OUT appears when it is complete. A merge that was stopped or killed is gone on with by the same
    command, from the last file that it finished.
    """
    if as_adapter and shard_gib != DEFAULT_SHARD_GIB:
        raise click.UsageError("--shard-gib is for full models only.")
    if rank and not as_adapter:
        raise click.UsageError("--rank is for --adapter only.")
    if not math.isfinite(shard_gib):
        raise click.UsageError(f"--shard-gib: came {shard_gib}, a finite number is needed.")
    from evomerge.config.mergekit import read_recipe
    from evomerge.merging.run import merge as run_merge

    if as_adapter:
        _merge_adapters(read_recipe(recipe), out, rank, as_json)
        return
    start = time.monotonic()
    line = ProgressLine()
    try:
        digest = run_merge(
            read_recipe(recipe), out, shard_bytes=max(1, int(shard_gib * GIB)), notify=line.show
        )
    finally:
        line.end()
    seconds = time.monotonic() - start
    progress = line.last
    assert progress is not None, "a merge tells at least its end"
    if as_json:
        print_json(
            {
                "folder": str(out),
                "digest": digest,
                "seconds": round(seconds, 3),
                "read_bytes": progress.read_bytes,
                "written_bytes": progress.written_bytes,
                "resumed_shards": list(progress.resumed),
            }
        )
        return
    click.echo(f"{out}  digest {digest}")
    click.echo(
        f"{progress.num_tensors} tensors in {seconds:.1f} s, {progress.read_bytes / GIB:.2f} GiB "
        f"read, {progress.written_bytes / GIB:.2f} GiB written"
    )
    if progress.resumed:
        click.echo(f"kept from an earlier run: {', '.join(progress.resumed)}")


def _merge_adapters(recipe: "Recipe", out: Path, rank: int | None, as_json: bool) -> None:
    from evomerge.merging.adapter import write_adapter

    report = write_adapter(recipe, out, rank)
    if as_json:
        print_json(
            {
                "folder": str(out),
                "ranks": dict(report.ranks),
                "replaced": list(report.replaced),
                "residuals": {name: left._asdict() for name, left in report.residuals.items()},
            }
        )
        return
    top = max(report.ranks.values(), default=0)
    click.echo(
        f"{out}  {len(report.ranks)} modules, rank at most {top}, "
        f"{len(report.replaced)} tensors whole"
    )
    if report.worst:
        module, left = report.worst
        click.echo(
            f"left out by --rank: at most {left.relative:.2%} of a module's norm "
            f"({left.absolute:.3g}, {module})"
        )


class ProgressLine:
    """One line on stderr that follows a merge, where stderr is a terminal.

    Attributes:
        last: What was told last; None before anything was.
    """

    def __init__(self) -> None:
        self.last: Progress | None = None
        self._shown = False
        self._drawn_at = 0.0

    def show(self, progress: "Progress") -> None:
        """Draw the line anew, at most ten times a second."""
        self.last = progress
        now = time.monotonic()
        if not sys.stderr.isatty() or now - self._drawn_at < 0.1:
            return
        self._shown, self._drawn_at = True, now
        text = (
            f"{progress.num_done}/{progress.num_tensors} tensors, "
            f"{progress.read_bytes / GIB:.2f} GiB read, "
            f"{progress.written_bytes / GIB:.2f} GiB written"
        )
        click.echo(f"\r\x1b[K{text}", err=True, nl=False)

    def end(self) -> None:
        """Take the line away."""
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)
