"""`python -m examples.burn_in.retrained`: the loss of a new version, with and without memory.

Trains a new version of flights and of rivers: the same specification with another seed, and with
fewer epochs (`VERSIONS`). Its states at many places of the streams start from the initial state
(`reset`), run over the last N/4, N/2 and N events from there, or carried from the stream's first
event (`exact`), N being the version's own burn-in. Prints the loss of the events that follow, draws
it to `docs/explanation/burn-in/retrained.svg`, with 95% intervals by resampling streams, and writes
the versions to `build/examples/retrained`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from examples.burn_in.pictures import COLORS, save
from examples.command import BUILT
from examples.rivers.data import CATCHMENT, DAY, LABEL, TEST, river_days
from models.artifact.artifact import Artifact, load_artifact
from models.artifact.manifest import MANIFEST_NAME
from models.artifact.writing import add_measurements
from models.errors import ModelsError
from models.pretrained.departures import flight_events
from models.spec.heads import LabelHead
from models.spec.spec_file import read_spec
from models.training.data import Streams, split_of, streams_of
from models.training.evaluate import run_network
from models.training.labels import labels_of
from models.training.measurements import measure
from models.training.scores import score_outputs
from models.training.trainer import train

HERE = Path(__file__).parents[1]
PICTURE = HERE.parent / "docs" / "explanation" / "burn-in" / "retrained.svg"
SEED = 2
DRAWS = 2000
BINS = 12
EXACT = "exact"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Version:
    """How a model is trained again, and where its new version takes over.

    Attributes:
        epochs, members: of the training.
        events: gives the table to train on.
        scored: gives the table of the streams that it takes over, in the test set, where every
            event has a label.
        head: whose loss is shown.
        after: events that are scored after each change.
        changes: of each stream.
    """

    epochs: int
    members: int
    events: Callable[[], pl.DataFrame]
    scored: Callable[[], pl.DataFrame]
    head: str
    after: int
    changes: int


def labelled_rivers() -> pl.DataFrame:
    """The catchments whose gauges did not fail in the test set, up to the last label."""
    days = river_days()
    last = pl.col(DAY).filter(pl.col(LABEL).is_not_null()).max()
    days = days.filter(pl.col(DAY) <= last)
    unlabelled = pl.col(LABEL).is_null() & (pl.col(DAY) >= TEST)
    return days.filter(~unlabelled.any().over(CATCHMENT))


VERSIONS: Mapping[str, Version] = {
    "flights": Version(4, 1, flight_events, flight_events, "late", 300, 20),
    "rivers": Version(15, 1, river_days, labelled_rivers, "week", 365, 12),
}


def main() -> None:
    """Train, score, print and draw."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, len(VERSIONS), sharex="col")
    for column, (name, version) in enumerate(VERSIONS.items()):
        artifact = new_version(name, version)
        if artifact.burn_in is None:
            raise SystemExit(f"{name}: the new version does not forget within its windows")
        losses = losses_of(artifact, version, artifact.burn_in)
        print("\n".join(table(name, artifact.burn_in, losses)), flush=True)
        draw(axes[0, column], axes[1, column], f"{name}: {version.head}", losses)
    save(PICTURE, figure)


def new_version(name: str, version: Version) -> Artifact:
    """The new version, trained unless it is there."""
    path = BUILT / "retrained" / name
    if not (path / MANIFEST_NAME).exists():
        spec, frame = read_spec(HERE / name / "spec.yaml"), version.events()
        if spec.training is None:
            raise ModelsError(f"{name}: expected `training`")
        changed = {
            "seed": SEED,
            "seeds": None,
            "epochs": version.epochs,
            "members": version.members,
        }
        training = spec.training.model_copy(update=changed)
        spec = spec.model_copy(update={"training": training})
        artifact = train(spec, frame, path, quiet=True, source=name).artifact
        add_measurements(path, measure(artifact, frame, name))
    return load_artifact(path)


def losses_of(artifact: Artifact, version: Version, burn_in: int) -> dict[str, Floats]:
    """By how states were started: the mean loss by stream and events since the change, [S, E]."""
    streams = streams_of(artifact.spec, version.scored())
    first = split_of(artifact.spec).test
    changes: list[NDArray[np.int64]] = []
    for start, stop in streams.spans:
        earliest = max(
            start + burn_in, start + int(np.searchsorted(streams.split_keys[start:stop], first))
        )
        latest = stop - version.after - 1
        if latest - earliest >= version.changes:
            changes.append(np.linspace(earliest, latest, version.changes).astype(np.int64))
    at = np.stack(changes)
    warm = {"reset": 0, "rewarm, N/4": burn_in // 4, "rewarm, N/2": burn_in // 2}
    warm["rewarm, N"] = burn_in
    losses = {}
    for name, events in warm.items():
        windows = [(each - events, each + version.after + 1) for each in at.ravel().tolist()]
        begins = np.cumsum([0, *(stop - start for start, stop in windows[:-1])])
        own = streams.windows(windows)
        losses[name] = _losses(artifact, version, own, begins + events)
    losses[EXACT] = _losses(artifact, version, streams, at.ravel())
    return {name: loss.reshape(*at.shape, -1).mean(axis=1) for name, loss in losses.items()}


def _losses(
    artifact: Artifact, version: Version, streams: Streams, changes: NDArray[np.int64]
) -> Floats:
    """The losses of the events after each change, float64 [changes, E]."""
    spec = artifact.spec
    outputs = run_network(spec, artifact.weights, streams, chunk=256)
    head = next(each for each in spec.heads if each.name == version.head)
    # a label is of the event itself, any other target of the next one
    first = changes + (0 if isinstance(head, LabelHead) else 1)
    at = (first[:, np.newaxis] + np.arange(version.after)).ravel()
    columns = artifact.outputs.by_name(outputs)[head.name]
    labels = labels_of(spec, streams.frame)
    scored = score_outputs(spec, head, columns, streams.columns, labels, at)
    loss = next(iter(scored.losses.values()))
    return np.asarray(loss, np.float64).reshape(len(changes), version.after)


def resampled(values: Floats) -> tuple[Any, Any]:
    """The ends of the 95% interval of the mean over streams, of [S, ...]."""
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975], axis=0)
    return low, high


def table(name: str, burn_in: int, losses: dict[str, Floats]) -> list[str]:
    """Mean losses over the first events after the change, as Markdown."""
    events = losses[EXACT].shape[1]
    spans = [(0, burn_in // 4), (burn_in // 4, min(burn_in, events))]
    titles = [f"events {start + 1:,} to {stop:,}" for start, stop in spans]
    lines = [
        f"{name}: N = {burn_in:,}, {len(losses[EXACT])} streams, loss minus exact",
        "",
        f"| state | {' | '.join(titles)} |",
        "| --- |" + " --- |" * len(spans),
    ]
    for state, loss in losses.items():
        cells = []
        for start, stop in spans:
            own, exact = (each[:, start:stop].mean(axis=1) for each in (loss, losses[EXACT]))
            low, high = resampled(own - exact)
            mean = (own - exact).mean()
            cells.append(
                f"loss {own.mean():.4f}"
                if state == EXACT
                else f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
            )
        lines.append(f"| {state} | {' | '.join(cells)} |")
    return [*lines, ""]


def draw(above: Axes, below: Axes, title: str, losses: dict[str, Floats]) -> None:
    """Draw the loss by events since the change, and below it the loss minus exact."""
    events = losses[EXACT].shape[1]
    edges = np.unique(np.geomspace(1, events + 1, BINS + 1).round().astype(np.int64)) - 1
    middles = [(start + 1 + stop) / 2 for start, stop in pairwise(edges)]
    binned = {
        state: np.stack([loss[:, a:b].mean(axis=1) for a, b in pairwise(edges)], axis=1)
        for state, loss in losses.items()
    }
    for color, (state, loss) in zip(COLORS, binned.items(), strict=False):
        above.plot(middles, loss.mean(axis=0), color=color, label=state)
        if state != EXACT:
            more = loss - binned[EXACT]
            low, high = resampled(more)
            below.plot(middles, more.mean(axis=0), color=color)
            below.fill_between(middles, low, high, color=color, alpha=0.2, linewidth=0)
    above.set(title=title, ylabel="log loss", xscale="log")
    above.legend(fontsize="small")
    below.axhline(0, color="black", linewidth=1, linestyle=":")
    below.set(xlabel="events since the change", ylabel="log loss minus exact", xscale="log")


if __name__ == "__main__":
    main()
