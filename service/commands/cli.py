"""The `carry` command-line interface: one thin function per command.

A command imports what it needs when it runs, so that `carry --help` is quick and every command
works whose dependencies are installed. Expected errors end in one line on stderr and exit status 1;
usage errors exit with 2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from models.errors import ModelsError
from service.commands.backup_command import backup, restore
from service.commands.capacity_command import capacity
from service.commands.common import DataDir, RedisUrl, one_line_errors
from service.commands.keys_command import keys_app
from service.commands.replay.command import replay
from service.commands.streams_command import streams_app

if TYPE_CHECKING:
    from service.settings import Settings

app = typer.Typer(
    name="carry",
    help="Serve stateful recurrent networks over event streams.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("replay")(replay)
app.command("backup")(backup)
app.command("restore")(restore)
app.add_typer(keys_app, name="keys")
app.command("capacity")(capacity)
app.add_typer(streams_app, name="streams")

Axes = Literal["batch_major", "time_major", "step"]
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The model's specification.")]
DataFile = Annotated[
    Path, typer.Argument(metavar="DATA", help="Events as CSV, JSON Lines or Parquet.")
]
WithTrees = Annotated[
    bool, typer.Option("--trees/--no-trees", help="Also train boosted trees as a baseline.")
]
TreesTime = Annotated[
    float, typer.Option("--trees-s", min=0, help="Time that boosted trees may take, in seconds.")
]
Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
Models = Annotated[
    Path | None, typer.Option(metavar="DIR", help="An artifact, or a directory of artifacts.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]


@contextmanager
def _training_errors() -> Iterator[None]:
    """Turn errors of models, and packages that are not installed, into one line."""
    try:
        with one_line_errors(ModelsError):
            yield
    except ModuleNotFoundError as error:
        hint = "training needs the extra `train` (in a clone: scripts/setup dev)"
        typer.echo(f"carry: {error}; {hint}", err=True)
        raise typer.Exit(1) from error


@app.command("serve")
def serve_command(
    host: Host = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="Port of the V2 protocol over gRPC; default: none.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Number of worker processes.")] = None,
    redis_url: RedisUrl = None,
    models: Models = None,
    data_dir: DataDir = None,
) -> None:
    """Serve models over HTTP. Every setting is also a CARRY_ variable; flags take precedence."""
    from service.commands.serve import CannotServeError, serve
    from service.engine.runtimes.loading import RuntimeUnavailableError
    from service.settings import Settings, SettingsError
    from service.telemetry.logs import configure_logs

    flags = {
        "host": host,
        "port": port,
        "grpc_port": grpc_port,
        "workers": workers,
        "redis_url": redis_url,
        "models_dir": models,
        "data_dir": data_dir,
    }
    expected = (CannotServeError, SettingsError, ModelsError, RuntimeUnavailableError)
    with one_line_errors(*expected):
        settings = Settings.load(flags)
        configure_logs(settings.telemetry.log_level, settings.telemetry.log_format)
        _report_settings(settings)
        serve(settings)


@app.command("check")
def check_command(
    host: Host = None,
    redis_url: RedisUrl = None,
    models: Models = None,
    data_dir: DataDir = None,
    grace_s: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds after SIGTERM until the supervisor kills the service."),
    ] = None,
    proxy_idle_s: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds for which the proxy keeps idle connections to it."),
    ] = None,
) -> None:
    """Run the start-up checks of settings, models and store, without serving or writing."""
    from service.commands.check import Result, run_checks
    from service.settings import Settings, SettingsError
    from service.telemetry.logs import configure_logs

    flags = {"host": host, "redis_url": redis_url, "models_dir": models, "data_dir": data_dir}
    configure_logs("warning", "console")
    try:
        settings = Settings.load(flags)
    except SettingsError as error:
        results = [Result("settings", False, str(error))]
    else:
        names = ", ".join(sorted(settings.origins)) or "none"
        results = [Result("settings", True, f"valid; set: {names}")]
        results += run_checks(settings, grace_s, proxy_idle_s)
    for result in results:
        typer.echo(f"{'ok' if result.ok else 'failed':7}{result.name:12} {result.detail}")
    if not all(result.ok for result in results):
        raise typer.Exit(1)


def _report_settings(settings: Settings) -> None:
    """Print the effective settings as a table for people, or log them as one line."""
    from structlog import get_logger

    shown = settings.effective()
    if settings.telemetry.log_format == "console":
        widest = max(len(setting.name) for setting in shown)
        for setting in shown:
            typer.echo(f"{setting.name:{widest}} {setting.value:40} {setting.origin}", err=True)
        return
    origins = {
        origin: [setting.name for setting in shown if setting.origin == origin]
        for origin in ("flag", "env")
    }
    values = {setting.name: setting.value for setting in shown}
    get_logger(__name__).info("settings", values=values, **origins)


@app.command("init")
def init_command(
    spec: SpecFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The artifact directory to write.")],
    seed: Annotated[int, typer.Option(help="Random seed of the weights.")] = 1,
    overwrite: Overwrite = False,
) -> None:
    """Write an artifact with random weights, for tests and benchmarks."""
    with _training_errors():
        from models.networks.initial_artifact import initialise_artifact
        from models.spec.spec_file import read_spec

        artifact = initialise_artifact(read_spec(spec), out, seed, overwrite=overwrite)
        typer.echo(f"{out}: model {artifact.spec.name}, version {artifact.version}")


@app.command("train")
def train_command(
    spec: SpecFile,
    data: DataFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The artifact directory to write.")],
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")] = False,
    trees: WithTrees = True,
    trees_s: TreesTime = 60.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a model, compare it with baselines, write the artifact, a report and plots."""
    with _training_errors():
        from models.training import commands

        commands.train_command(
            spec,
            data,
            out,
            resume=resume,
            overwrite=overwrite,
            trees=trees,
            trees_s=trees_s,
            quiet=quiet,
        )


@app.command("evaluate")
def evaluate_command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The model's directory.")],
    data: DataFile,
    chunk: Annotated[int, typer.Option(min=1, help="Longest chunk; chunk sizes are random.")] = 64,
    seed: Annotated[int, typer.Option(help="Random seed of the chunk sizes.")] = 1,
    since: Annotated[
        str | None, typer.Option(help="Score events from this RFC 3339 time on.")
    ] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Score the events of the test set only.")
    ] = False,
    anomalies: Annotated[
        str | None,
        typer.Option(help="Boolean column of labelled anomalies, to score alarms against."),
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Plot the streams with most missed anomalies and false alarms."
        ),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option("--baselines", help="Compare with the baselines of a report, with intervals."),
    ] = False,
    trees: WithTrees = True,
    trees_s: TreesTime = 60.0,
) -> None:
    """Score an artifact on data, chunk by chunk as the service computes it."""
    if plots is not None and anomalies is None:
        raise typer.BadParameter("--plots needs --anomalies")
    with _training_errors():
        from models.training import commands

        scores = commands.evaluate_command(
            artifact,
            data,
            chunk=chunk,
            seed=seed,
            since=since,
            held_out=held_out,
            anomalies=anomalies,
            plots=plots,
            baselines=baselines,
            trees=trees,
            trees_s=trees_s,
        )
        typer.echo(json.dumps(scores, indent=2))


@app.command("plot")
def plot_command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The model's directory.")],
    data: DataFile,
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="The stream's name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output file, .svg, .png or .pdf.")],
    since: Annotated[
        str | None, typer.Option(help="Show events from this RFC 3339 time on.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Show events before this RFC 3339 time.")
    ] = None,
    anomalies: Annotated[
        str | None, typer.Option(help="Boolean column of labelled anomalies, to show them.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Plot a stream over time: values, forecasts, scores, alarms and labels."""
    with _training_errors():
        from models.training import commands

        commands.plot_command(
            artifact,
            data,
            stream,
            out,
            since=since,
            until=until,
            anomalies=anomalies,
            overwrite=overwrite,
        )
        typer.echo(f"{out}: stream {stream}")


@app.command("score")
def score_command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The model's directory.")],
    data: DataFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output file, .parquet or .csv.")],
    stream: Annotated[
        str | None, typer.Option(help="Column of stream names; default: that of training.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a model's outputs for a file of events, as the service would answer them."""
    with _training_errors():
        from rich.console import Console

        from models.offline.score import score_file
        from models.training.progress import Progress

        progress = Progress(Console(quiet=quiet))
        with progress.task("events", 1.0) as advance:
            scored = score_file(
                artifact,
                data,
                out,
                stream=stream,
                resume=resume,
                overwrite=overwrite,
                advance=lambda rows: advance(0.0, f"{rows:,} done"),
            )
        progress.say(f"{out}: {scored.events:,} events of {scored.streams:,} streams")
        if scored.out_of_order:
            progress.say(
                f"warning: {scored.out_of_order:,} events are earlier than one before them in "
                "their stream; `carry train` sorts them: sort DATA by time to score as trained",
                "yellow",
            )


@app.command("import")
def import_command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A saved Keras model, or an ONNX graph.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The artifact directory to write.")],
    name: Annotated[
        str | None,
        typer.Option(help="The model's name; default: the name of the file or Triton folder."),
    ] = None,
    overwrite: Overwrite = False,
    reset_every: Annotated[
        int | None,
        typer.Option(min=1, help="Reset streams every N events, the length of training windows."),
    ] = None,
    memory_mib: Annotated[
        int, typer.Option(min=1, help="Memory limit for reading and verifying the model, in MiB.")
    ] = 8192,
    time_s: Annotated[
        float,
        typer.Option(min=1, help="Time limit for reading and verifying the model, in seconds."),
    ] = 600.0,
    state: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IN=OUT", help="ONNX: a state input and the output with its next value."
        ),
    ] = None,
    input_: Annotated[
        list[str] | None, typer.Option("--input", help="ONNX: a feature input.")
    ] = None,
    output: Annotated[list[str] | None, typer.Option(help="ONNX: an output to serve.")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="ONNX: the input with row lengths [B].")
    ] = None,
    mask: Annotated[str | None, typer.Option(help="ONNX: the input with the mask [B, T].")] = None,
    initial: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IN=VALUE", help="ONNX: a state's initial value, a number or .npy file."
        ),
    ] = None,
    axes: Annotated[
        Axes | None, typer.Option(help="ONNX: order of the axes, if it is ambiguous.")
    ] = None,
    triton: Annotated[
        Path | None, typer.Option(metavar="config.pbtxt", help="ONNX: Triton's configuration.")
    ] = None,
) -> None:
    """Import a Keras model or an ONNX graph as an artifact, and verify it."""
    with _training_errors():
        from models.errors import ImportedModelError
        from models.importing.isolation import Limits
        from models.importing.packaging import import_keras_model, import_onnx_model, onnx_options

        limits = Limits(memory_bytes=memory_mib * 2**20, time_s=time_s)
        if model.suffix.lower() == ".onnx":
            options = onnx_options(
                states=state or (),
                inputs=input_ or (),
                outputs=output or (),
                lengths=lengths,
                mask=mask,
                initial=initial or (),
                axes=axes,
                triton=triton,
            )
            imported = import_onnx_model(
                model,
                out,
                name=name,
                options=options,
                overwrite=overwrite,
                reset_every=reset_every,
                limits=limits,
            )
        elif any((state, input_, output, lengths, mask, initial, axes, triton)):
            raise ImportedModelError(
                f"{model}: expected a .onnx file with --state, --input, --output, --lengths, "
                "--mask, --initial, --axes and --triton; they describe ONNX graphs"
            )
        else:
            imported = import_keras_model(
                model, out, name=name, overwrite=overwrite, reset_every=reset_every, limits=limits
            )
        artifact = imported.artifact
        typer.echo(f"{out}: model {artifact.spec.name}, version {artifact.version}")
        for line in imported.lines():
            typer.echo(line)


@app.command("graph")
def graph_command(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="ARTIFACT...", help="The models' directories.")
    ],
) -> None:
    """Write the ONNX graphs of artifacts, for other programs; the service does not read them."""
    with _training_errors():
        from models.artifact.artifact import add_graph

        for path in artifacts:
            artifact = add_graph(path)
            size = len(artifact.graphs.data or b"")
            typer.echo(f"{path}: the graph of {artifact.spec.name}, {size:,} bytes")


@app.command("version")
def version_command() -> None:
    """Print the version."""
    typer.echo(version("carry"))


def main() -> None:
    """The console script."""
    # TensorFlow logs its import to stderr from C++; errors are still logged. Without oneDNN sums
    # are in the same order on every processor, as in the service.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    app(prog_name="carry")


if __name__ == "__main__":
    main()
