"""Commands of `carry` that make, evaluate and convert models; each is a function of Python too.

The options of a command are the arguments of its function, so that `carry train` and `carry.train`
are the same. A function imports what it needs when it runs: `carry --help` is quick, and every
command works whose packages are installed. All raise `ModelsError` if a specification, a table, a
graph or an artifact is rejected.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from models.errors import ArtifactError, DataError, ImportedModelError, SpecError, VerdictError

if TYPE_CHECKING:
    from models.artifact.artifact import Artifact

    DataFiles = Path | Sequence[Path]
else:
    # typer evaluates annotations
    Artifact = Any
    DataFiles = Annotated[
        list[Path],
        typer.Argument(metavar="DATA...", help="Events: files, folders or globs."),
    ]

ArtifactDir = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The model's directory.")]
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The model's specification.")]
DataFile = Annotated[
    Path,
    typer.Argument(metavar="DATA", help="Events as CSV, JSON Lines or Parquet; also a folder."),
]
OutDir = Annotated[Path, typer.Argument(metavar="OUT", help="The artifact directory to write.")]
Trees = Annotated[
    bool, typer.Option("--trees/--no-trees", help="Also train boosted trees as a baseline.")
]
TreesTime = Annotated[
    float | None,
    typer.Option("--trees-s", min=0, help="Time that boosted trees may take, in seconds."),
]
Anomalies = Annotated[
    str | None, typer.Option(help="Boolean column of labelled anomalies, to score or show them.")
]
Since = Annotated[str | None, typer.Option(help="Score or show events from this RFC 3339 time on.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing.")]
Chunk = Annotated[int, typer.Option(min=1, help="Longest chunk; chunk sizes are random.")]
FailIf = Literal["worse", "not-better"]
Axes = Literal["batch_major", "time_major", "step", "unbatched"]


def initialise(
    spec: SpecFile,
    out: OutDir,
    seed: Annotated[int, typer.Option(help="Random seed of the weights.")] = 1,
    overwrite: Overwrite = False,
) -> None:
    """Write an artifact with random weights, for tests and benchmarks."""
    from models.networks.initial_artifact import initialise_artifact
    from models.spec.spec_file import read_spec

    artifact = initialise_artifact(read_spec(spec), out, seed, overwrite=overwrite)
    typer.echo(f"{out}: model {artifact.spec.name}, version {artifact.version}")


def train(
    spec: SpecFile,
    data: DataFiles,
    out: OutDir,
    *,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A first result: a quarter of the epochs, one network, no trees."
        ),
    ] = False,
    resume: Resume = False,
    trees: Trees = True,
    trees_s: TreesTime = 60.0,
    anomalies: Anomalies = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit with status 3 if a verdict is not to serve the model."),
    ] = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> Artifact:
    """Train a model, compare it with baselines, write the artifact, a report and plots.

    `resume` continues with the training or with the report; `trees_s` of None is no limit.

    Raises:
        SpecError: with the line of what cannot be trained, as for what cannot be read.
        VerdictError: with `strict`, the report's verdict is not to serve the model for a head, or
            there is no report or no verdict. The artifact is written.
    """
    from models.spec.model import schema_of
    from models.spec.spec_file import add_line_number, read_spec
    from models.training.files import read_data
    from models.training.train_frame import check_verdicts, train_frame

    parsed = read_spec(spec)
    try:
        artifact = train_frame(
            parsed,
            read_data(data, schema_of(parsed)),
            out,
            quick=quick,
            resume=resume,
            overwrite=overwrite,
            trees=trees,
            trees_s=trees_s,
            anomalies=anomalies,
            quiet=quiet,
            source=", ".join(map(str, [data] if isinstance(data, (str, Path)) else data)),
        )
    except SpecError as error:
        raise add_line_number(spec, error) from error
    if strict:
        check_verdicts(out)
    return artifact


def evaluate(
    artifact: ArtifactDir,
    data: DataFile,
    *,
    chunk: Chunk = 64,
    seed: Annotated[int, typer.Option(help="Random seed of the chunk sizes.")] = 0,
    since: Since = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Score the events of the test set only.")
    ] = False,
    anomalies: Anomalies = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Plot the burn-in, and the streams with most missed anomalies and false alarms.",
        ),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option("--baselines", help="Compare with the baselines of a report, with intervals."),
    ] = False,
    trees: Trees = True,
    trees_s: TreesTime = 60.0,
    stream: Annotated[
        str | None,
        typer.Option(help="Column of stream names, of a model that takes rows; DATA has its rows."),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write burn-in and ranges into the artifact.")
    ] = False,
    quiet: Quiet = False,
) -> dict[str, Any]:
    """Score an artifact on data, chunk by chunk as the service computes it.

    Events before `since` only move the states. With `baselines`, which are fitted to the events
    before the artifact's `test_from`, the test set is scored. Of a model that takes rows, burn-in
    and ranges are measured alone.

    Returns:
        What `models.training.evaluate.evaluate` gives; with baselines, what
        `models.training.report.make_report` does; for a model that takes rows, what
        `models.training.measurements.measure_rows` does.
    """
    from rich.console import Console

    from models.artifact.artifact import load_artifact
    from models.artifact.files import replace_file
    from models.artifact.writing import add_measurements
    from models.training import evaluate as scoring
    from models.training import measurements
    from models.training.alarm_report import detection_lines
    from models.training.burn_in import burn_in_lines
    from models.training.files import read_data
    from models.training.progress import Progress

    loaded = load_artifact(artifact)
    frame = read_data(data, loaded.spec.events)
    # The scores are on stdout.
    progress = Progress(Console(quiet=quiet, stderr=True))
    chosen: dict[str, Any] = {
        "chunk": chunk,
        "seed": seed,
        "since": since,
        "anomalies": anomalies,
        "source": str(data),
    }
    if loaded.spec.events is None:
        if stream is None:
            raise DataError(expected=f"--stream for {artifact}, which takes rows", got="none")
        scores = measurements.measure_rows(loaded, frame, stream, str(data))
    elif baselines:
        from models.training.report import make_report

        with progress.task("report", 1.0) as note:
            scores = make_report(
                *(loaded, frame),
                **chosen,
                trees=trees,
                trees_s=trees_s,
                note=lambda text: note(0.0, text),
            )
    else:
        done = 0
        with progress.task("events", max(1, frame.height)) as advance:

            def count(events: int) -> None:
                nonlocal done
                done += events
                advance(done, f"{done:,} of {frame.height:,}")

            scores = scoring.evaluate(loaded, frame, **chosen, held_out=held_out, advance=count)
    if record:
        found = scores
        if loaded.spec.events is not None:
            found = measurements.measure(loaded, frame, str(data), scores)
        add_measurements(
            artifact, {**measurements.entry_of(found.get("burn_in")), "ranges": found["ranges"]}
        )
    burn_in = scores.get("burn_in")
    if burn_in is not None:
        progress.say(burn_in_lines(burn_in)[0])
    if "detection" in scores:
        for line in detection_lines(scores):
            progress.say(line)
        for warning in scores["detection"]["warnings"]:
            progress.say(f"warning: {warning}", "yellow")
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        if burn_in is not None:
            from models.training.plots import plot_burn_in

            replace_file(plots / "burn-in.png", plot_burn_in(burn_in))
    if plots is not None and anomalies is not None:
        from models.training.stream_plot import plot_streams

        worst = [each["stream"] for each in scores["detection"]["worst"]]
        with progress.task("plots", max(1, len(worst))) as advance:
            drawn = plot_streams(
                *(loaded, frame, worst),
                since=since,
                held_out=held_out or baselines,
                anomalies=anomalies,
                source=str(data),
            )
            for number, content in enumerate(drawn, start=1):
                replace_file(plots / f"worst-{number:02d}.svg", content)
                advance(number, f"{number} of {len(worst)}")
    return {**scores, **measurements.entry_of(burn_in)}


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The artifact to compare with.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The artifact that is compared with it.")],
    data: DataFile,
    *,
    since: Since = None,
    chunk: Chunk = 64,
    seed: Annotated[int, typer.Option(help="Random seed of chunk sizes and resampling.")] = 0,
    fail_if: Annotated[FailIf | None, typer.Option(help="Exit with status 3 if B is that.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
) -> dict[str, Any]:
    """Score two artifacts on the same events, with intervals of their differences.

    Without `since` these are the events that both hold out.

    Returns:
        What `models.training.compare.compare_artifacts` gives.

    Raises:
        VerdictError: B is what `fail_if` says: `worse` than A for a head, or `not-better` for any.
    """
    from models.artifact.artifact import load_artifact
    from models.spec.model import schema_of
    from models.training.compare import compare_artifacts, comparison_lines
    from models.training.files import read_data

    loaded = load_artifact(a), load_artifact(b)
    frames = [read_data(data, schema_of(each.spec)) for each in loaded]
    compared = compare_artifacts(
        *(loaded, (frames[0], frames[1])), since=since, chunk=chunk, seed=seed, source=str(data)
    )
    if as_json:
        typer.echo(json.dumps(compared, indent=2))
    elif not quiet:
        typer.echo("\n".join(comparison_lines(compared)))
    verdict = compared["verdict"]
    if fail_if == verdict or (fail_if == "not-better" and verdict != "better"):
        wanted = "no worse" if fail_if == "worse" else "better"
        got = ", ".join(f"{each['verdict']} for {head}" for head, each in compared["heads"].items())
        raise VerdictError(f"{b}: expected a model {wanted} than {a}, got {got}")
    return compared


def plot(
    artifact: ArtifactDir,
    data: DataFile,
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="The stream's name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output file, .svg, .png or .pdf.")],
    *,
    since: Since = None,
    until: Annotated[
        str | None, typer.Option(help="Show events before this RFC 3339 time.")
    ] = None,
    anomalies: Anomalies = None,
    overwrite: Overwrite = False,
) -> None:
    """Plot a stream over time: values, forecasts, scores, alarms and labels."""
    from models.artifact.artifact import load_artifact
    from models.artifact.files import replace_file
    from models.spec.model import schema_of
    from models.training.files import read_data
    from models.training.stream_plot import FORMATS, plot_streams

    kind = out.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise DataError(expected=f"OUT to end in .{', .'.join(FORMATS)}", got=str(out))
    if out.exists() and not overwrite:
        raise ArtifactError(f"{out}: exists; expected a new path, or --overwrite")
    loaded = load_artifact(artifact)
    (content,) = plot_streams(
        *(loaded, read_data(data, schema_of(loaded.spec)), [stream]),
        kind=kind,
        since=since,
        until=until,
        anomalies=anomalies,
        source=str(data),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, content)
    typer.echo(f"{out}: stream {stream}")


def import_model(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A saved Keras model, or an ONNX graph.")
    ],
    out: OutDir,
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
        typer.Option(metavar="IN=OUT", help="A state input and the output with its next value."),
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
    constant: Annotated[
        list[str] | None,
        typer.Option(metavar="IN=NUMBER", help="ONNX: an input that has this value in every call."),
    ] = None,
    features: Annotated[
        int | None,
        typer.Option(min=1, help="ONNX: columns of a row, if the graph does not declare them."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="ONNX: values of earlier rows that it reads before each row."),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OUT=NAME,NAME", help="ONNX: classes of an output, also OUT=FILE.txt."
        ),
    ] = None,
    axes: Annotated[
        Axes | None, typer.Option(help="ONNX: order of the axes, if it is ambiguous.")
    ] = None,
    triton: Annotated[
        Path | None, typer.Option(metavar="config.pbtxt", help="ONNX: Triton's configuration.")
    ] = None,
    code: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.py", help="Keras: the model's own classes; they are run: trust them."
        ),
    ] = None,
) -> None:
    """Import a Keras model or an ONNX graph as an artifact, and verify it."""
    from models.importing.isolation import Limits
    from models.importing.packaging import import_keras_model, import_onnx_model, onnx_options

    chosen: dict[str, Any] = {
        "name": name,
        "overwrite": overwrite,
        "reset_every": reset_every,
        "limits": Limits(memory_bytes=memory_mib * 2**20, time_s=time_s),
    }
    if model.suffix.lower() == ".onnx":
        if code is not None:
            raise ImportedModelError(f"{model}: expected a Keras model with --code")
        options = onnx_options(
            states=state or (),
            inputs=input_ or (),
            outputs=output or (),
            lengths=lengths,
            mask=mask,
            initial=initial or (),
            constants=constant or (),
            features=features,
            context=context,
            labels=labels or (),
            axes=axes,
            triton=triton,
        )
        imported = import_onnx_model(model, out, options=options, **chosen)
    elif any((input_, output, lengths, mask, initial, constant, features, context, labels)) or (
        axes or triton
    ):
        raise ImportedModelError(
            f"{model}: expected a .onnx file with --input, --output, --lengths, --mask, "
            "--initial, --constant, --features, --context, --labels, --axes and --triton; they "
            "describe ONNX graphs"
        )
    else:
        imported = import_keras_model(model, out, code=code, states=state or (), **chosen)
    artifact = imported.artifact
    typer.echo(f"{out}: model {artifact.spec.name}, version {artifact.version}")
    for line in imported.lines():
        typer.echo(line)


def write_graphs(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="ARTIFACT...", help="The models' directories.")
    ],
) -> None:
    """Write the ONNX graphs of artifacts, for other programs; the service does not read them."""
    from models.artifact.writing import add_graph

    for path in artifacts:
        artifact = add_graph(path)
        size = len(artifact.graphs.data or b"")
        typer.echo(f"{path}: the graph of {artifact.spec.name}, {size:,} bytes")


def _printing_command(function: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Make a command of a function, which prints the result as JSON."""

    @wraps(function)
    def command(**options: Any) -> None:
        typer.echo(json.dumps(function(**options), indent=2))

    return command


COMMANDS: dict[str, Callable[..., Any]] = {
    "init": initialise,
    "train": train,
    "evaluate": _printing_command(evaluate),
    "compare": compare,
    "plot": plot,
    "import": import_model,
    "graph": write_graphs,
}


def add_model_commands(app: typer.Typer) -> None:
    """Add the commands to an application; the help of each is the first paragraph of its text."""
    for name, function in COMMANDS.items():
        text, _, _ = (inspect.getdoc(function) or "").partition("\n\n")
        app.command(name, help=text)(function)
