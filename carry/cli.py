"""The console script `carry`: all commands, one thin function each.

A command imports what it needs when it runs, so that `carry --help` is quick and every command
works whose dependencies are installed. Expected errors end in one line on stderr and exit status 1;
usage errors exit with 2.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from carry.own_packages import load_own_packages
from carry.public import EXTRAS, describe_missing

# Pydantic would look for plugins, of which none is used, in the metadata of all installed packages.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
# Worker processes import this module first too, since it is the main module's.
load_own_packages()

from models.commands import add_model_commands  # noqa: E402
from models.errors import ModelsError  # noqa: E402
from service.commands.backfill import backfill, score  # noqa: E402
from service.commands.backup import backup, restore  # noqa: E402
from service.commands.capacity import capacity  # noqa: E402
from service.commands.consume import consume  # noqa: E402
from service.commands.dlq import dlq_app  # noqa: E402
from service.commands.keys import keys_app  # noqa: E402
from service.commands.models import models_app  # noqa: E402
from service.commands.produce import produce  # noqa: E402
from service.commands.replay.command import replay  # noqa: E402
from service.commands.serve import check, serve  # noqa: E402
from service.commands.streams import list_alarms, streams_app  # noqa: E402
from service.core.errors import CarryError, OperatorError  # noqa: E402


class Commands(TyperGroup):
    """Command group that reports an expected error as one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command of the command line."""
        try:
            return super().invoke(ctx)
        except (CarryError, ModelsError, OperatorError, OSError, ModuleNotFoundError) as error:
            is_of_service = isinstance(error, OSError) and ctx.invoked_subcommand == "serve"
            if is_of_service or isinstance(error, BrokenPipeError):
                raise  # not expected, or handled by Typer
            line = error.detail if isinstance(error, CarryError) else str(error)
            if isinstance(error, ModuleNotFoundError):
                extra = EXTRAS.get(ctx.invoked_subcommand or "")
                if extra is None:
                    raise
                line = describe_missing(error, f"carry {ctx.invoked_subcommand}", extra)
            typer.echo(f"carry: {line}", err=True)
            # status 1 of a replay means that the service broke a guarantee
            status = 2 if ctx.invoked_subcommand == "replay" else 1
            raise typer.Exit(getattr(error, "exit_status", status)) from error


app = typer.Typer(
    cls=Commands,
    name="carry",
    help="Serve stateful recurrent networks over event streams.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve)
app.command("check")(check)
app.command("consume")(consume)
app.add_typer(dlq_app, name="dlq")
app.command("produce")(produce)
add_model_commands(app)
app.command("replay")(replay)
app.command("backfill")(backfill)
app.command("score")(score)
app.command("backup")(backup)
app.command("restore")(restore)
app.add_typer(keys_app, name="keys")
app.add_typer(models_app, name="models")
app.command("capacity")(capacity)
app.add_typer(streams_app, name="streams")
app.command("alarms")(list_alarms)


@app.command("version")
def print_version() -> None:
    """Print the version."""
    typer.echo(version("carry"))


def _print_and_exit(is_asked: bool) -> None:
    if is_asked:
        print_version()
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_and_exit, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a command; its processes ignore modules of the working directory."""
    os.environ["PYTHONSAFEPATH"] = "1"
    # TensorFlow logs its start to stderr from C++; errors are still logged. Without oneDNN sums
    # are in the same order on every processor, as in the service.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    app(prog_name="carry")


if __name__ == "__main__":
    main()
