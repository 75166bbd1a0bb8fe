"""`python -m examples.burn_in`: measure after how many events each model forgets.

Measures the pretrained models and those of the examples, prints a table, and draws the differences
by events since the initial state to `docs/explanation/burn-in/forgetting.svg`. Examples without an
artifact in `build/examples` are trained first, without report and baselines. The measurements are
written into the artifacts. The models of the post, which are not trained, get random rows.
`NAME...` measures some of the models, without the picture.

`python -m examples.burn_in.retrained` shows what a new version's loss is without memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from examples.burn_in.pictures import COLORS, save
from examples.command import BUILT
from examples.customers.data import purchase_events
from examples.labelling.data import labelled_days
from examples.post.__main__ import package
from examples.rivers.data import river_days
from examples.scales.data import meters
from examples.sensors.data import sensors
from examples.weather.data import weather_events
from models.artifact.artifact import load_artifact
from models.artifact.manifest import MANIFEST_NAME
from models.artifact.writing import add_measurements
from models.pretrained.departures import flight_events
from models.spec.spec_file import read_spec
from models.training.burn_in import QUANTILES, measure_burn_in, measure_rows_burn_in
from models.training.data import split_of, streams_of
from models.training.evaluate import run_chunks
from models.training.measurements import measure
from models.training.trainer import train

HERE = Path(__file__).parents[1]
PRETRAINED = HERE.parent / "models" / "pretrained"
PICTURE = HERE.parent / "docs" / "explanation" / "burn-in" / "forgetting.svg"
POST = HERE / "post"
STREAMS, ROWS = 20, 1000
SETTLED = str(QUANTILES[-1])


class Example(NamedTuple):
    """A model of the table: where its artifact is, and its data."""

    path: Path
    events: Callable[[], pl.DataFrame]


EXAMPLES: Mapping[str, Example] = {
    "flights": Example(PRETRAINED / "flights", flight_events),
    "rivers": Example(PRETRAINED / "rivers", river_days),
    "customers": Example(BUILT / "customers", purchase_events),
    "weather": Example(BUILT / "weather", weather_events),
    "labelling": Example(BUILT / "labelling", labelled_days),
    "forecast": Example(BUILT / "forecast", weather_events),
    "scales": Example(BUILT / "scales", lambda: meters(1)),
    "sensors": Example(BUILT / "sensors", lambda: sensors("development")),
}


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.burn_in",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXAMPLES)}")
    names = parser.parse_args().names or list(EXAMPLES)
    if unknown := set(names) - EXAMPLES.keys():
        parser.error(f"expected names of {', '.join(EXAMPLES)}, got {', '.join(sorted(unknown))}")
    shares = " | ".join(f"{quantile:.0%}" for quantile in QUANTILES)
    print(f"| model | output | windows of up to | {shares} | burn-in |\n| {'--- | ' * 7}")
    measured = {name: measured_of(name) for name in names}
    if len(names) == len(EXAMPLES):
        for spec in sorted(POST.glob("*.yaml")):
            with tempfile.TemporaryDirectory() as folder:
                print_rows(f"post: {spec.stem}", burn_in_of_post(spec.stem, Path(folder)))
        save(PICTURE, figure_of({name: found for name, found in measured.items() if found}))


def measured_of(name: str) -> dict[str, Any] | None:
    """Measure one model, write it into its artifact and print its rows."""
    path, events = EXAMPLES[name]
    frame = events()
    if not (path / MANIFEST_NAME).exists():
        train(read_spec(HERE / name / "spec.yaml"), frame, path, quiet=True, source=name)
    artifact = load_artifact(path)
    streams = streams_of(artifact.spec, frame)
    outputs = run_chunks(artifact, streams)
    begun_s = time.process_time()
    burn_in = measure_burn_in(artifact, streams, outputs, split_of(artifact.spec).test)
    took_s = time.process_time() - begun_s
    scores = {} if burn_in is None else {"burn_in": burn_in}
    add_measurements(path, measure(artifact, frame, name, scores))
    print_rows(name, burn_in)
    print(f"{name}: {took_s:.1f} s of processor time", file=sys.stderr)
    return burn_in


def burn_in_of_post(name: str, folder: Path) -> dict[str, Any] | None:
    """Measure a model of the post on random rows; one with events takes them as rows."""
    artifact = package(name, folder / name)
    random = np.random.default_rng(1)
    shape = (STREAMS, ROWS, artifact.spec.input_features)
    return measure_rows_burn_in(artifact, list(random.normal(size=shape).astype(np.float32)))


def print_rows(name: str, burn_in: dict[str, Any] | None) -> None:
    """Print the rows of a model in the table."""
    if burn_in is None:
        print(f"| {name} | | | | | | no state is carried |", flush=True)
        return
    longest, total = burn_in["longest_events"], events_text(burn_in["events"])
    for output, each in burn_in["outputs"].items():
        cells = " | ".join(map(events_text, each["events"].values()))
        print(f"| {name} | `{output}` | {longest:,} | {cells} | **{total}** |", flush=True)


def events_text(events: int | None) -> str:
    """A number of events in a table."""
    return "not reached" if events is None else f"{events:,}"


def figure_of(measured: Mapping[str, dict[str, Any]]) -> Figure:
    """The slowest output of each model: the difference that one window in a hundred exceeds."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    for color, (name, burn_in) in zip(COLORS, measured.items(), strict=False):
        outputs = burn_in["outputs"]
        slowest = max(outputs, key=lambda each: outputs[each]["events"][SETTLED] or float("inf"))
        curve = burn_in["curves"]["outputs"][slowest][SETTLED]
        shares = [max(value / outputs[slowest]["tolerance"], 1e-3) for value in curve]
        label = name if slowest in ("", name) else f"{name}: {slowest}"
        axes.plot(burn_in["curves"]["events"], shares, color=color, label=label)
    axes.axhline(1, color="black", linewidth=1, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="events since the initial state")
    axes.set(ylabel="difference over tolerance,\n99% of windows below")
    axes.legend(fontsize="small", ncols=2)
    return figure


if __name__ == "__main__":
    main()
