"""The command group: rows, exit codes, and how errors are printed."""

import sys

import click

from evomerge.cli.check import check
from evomerge.cli.confirm import confirm
from evomerge.cli.eval import eval_model
from evomerge.cli.export import export
from evomerge.cli.import_genome import import_genome
from evomerge.cli.merge import merge
from evomerge.cli.resume import resume
from evomerge.cli.search import search
from evomerge.cli.status import status
from evomerge.errors import EvoMergeError


class Commands(click.Group):
    """Lists commands in the order in which a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the rows below."""
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="evomerge")
def cli() -> None:
    """Search for the best merge of fine-tuned language models, and trust what it found.

    \b
    evomerge check  configs/quickstart.yaml    what would run, or all that is wrong
    evomerge search configs/quickstart.yaml    run it; Ctrl-C stops, resume goes on
    evomerge export configs/quickstart.yaml    the winner as a mergekit YAML and a model

    Exit codes: 0 done, 1 an error that is explained in one sentence, 2 wrong usage, 3 stopped and
    resumable.
    """  # noqa: D301 - click looks for the backspace itself: it keeps the lines below as they are


for command in (
    check,
    import_genome,
    search,
    resume,
    status,
    confirm,
    export,
    merge,
    eval_model,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line; user errors are printed without a traceback."""
    try:
        cli(standalone_mode=False)
    except EvoMergeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        sys.stdout = None
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(3)


if __name__ == "__main__":
    main()
