"""The `carry` command: one thin function per task.

Nothing heavy is imported before the task that needs it is chosen, so that `carry --help` is
quick and a lean installation misses only what it lacks. What goes wrong on purpose ends in one
line on stderr and exit status 1; a wrong call ends in 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from models.errors import ModelsError
from service.replay.command import replay
from service.streams_command import streams_app

app = typer.Typer(
    name="carry",
    help="Serve stateful stacked LSTMs over event streams.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("replay")(replay)
app.add_typer(streams_app, name="streams")

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The model's specification.")]
DataFile = Annotated[
    Path, typer.Argument(metavar="DATA", help="Events as CSV, JSON Lines or Parquet.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn expected failures into one line and exit status 1."""
    try:
        yield
    except (ModelsError, ModuleNotFoundError) as error:
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = "; pip install 'carry[tensorflow,train]' has what training needs"
        typer.echo(f"carry: {error}{hint}", err=True)
        raise typer.Exit(1) from error


@app.command("serve")
def serve_command(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes on the port.")] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="Where states are kept; without it, an embedded Valkey.")
    ] = None,
    models: Annotated[
        Path | None, typer.Option(metavar="DIR", help="One artifact, or a directory of them.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the embedded Valkey keeps its data.")
    ] = None,
) -> None:
    """Serve models over HTTP. Every setting is also a CARRY_ variable; a flag wins."""
    from service.errors import CarryError
    from service.ops.logs import configure_logs
    from service.serve import CannotServeError, serve
    from service.settings import Settings, SettingsError
    from service.state.embedded import EmbeddedError

    flags = {
        "host": host,
        "port": port,
        "workers": workers,
        "redis_url": redis_url,
        "models_dir": models,
        "data_dir": data_dir,
    }
    try:
        settings = Settings.load(flags)
        configure_logs(settings.log_level, settings.log_format)
        for setting in settings.effective():
            typer.echo(f"{setting.name:20} {setting.value:40} {setting.origin}", err=True)
        serve(settings)
    except (CannotServeError, SettingsError, ModelsError, EmbeddedError, CarryError) as error:
        typer.echo(f"carry: {error}", err=True)
        raise typer.Exit(1) from error


@app.command("init")
def init_command(
    spec: SpecFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The artifact directory to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 1,
    overwrite: Overwrite = False,
) -> None:
    """Write an artifact with fresh, seeded weights, for trials and benchmarks."""
    with _one_line_errors():
        from models.init import initialise_artifact
        from models.spec import read_spec

        artifact = initialise_artifact(read_spec(spec), out, seed, overwrite=overwrite)
        typer.echo(f"{out}: model {artifact.spec.name}, version {artifact.version}")


@app.command("version")
def version_command() -> None:
    """Print the version."""
    typer.echo(version("carry"))


def main() -> None:
    """The console script."""
    app(prog_name="carry")


if __name__ == "__main__":
    main()
