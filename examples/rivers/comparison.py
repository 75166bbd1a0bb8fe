"""`python -m examples.rivers.comparison`: carried memory beside windows.

    train    fit all methods, or those of --method, to the training catchments
    score    score them on the held-out catchments

Methods: `lstm`, `tcn-127`, `tcn-511`, `trees`. `docs/explanation/examples.md` fixes data, methods
and the decision rule. Needs LightGBM: pip install lightgbm==4.7.0. Writes to
`build/examples/rivers/comparison`; `score` prints the table and writes it there as `comparison.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from examples.command import BUILT
from examples.rivers.data import SPIN_UP_DAYS, rivers
from examples.rivers.networks import LSTM, NETWORKS, WINDOWS, Network, log_losses, spec_of
from examples.rivers.trees import LAGS, Trees, tune_trees
from examples.rivers.windows import CLASSES, STREAM, codes
from models.artifact.artifact import Artifact, load_artifact
from models.errors import ModelsError
from models.training.train_frame import train_frame

Floats = NDArray[np.float64]

OUT = BUILT / "rivers" / "comparison"
TREES = "trees"
DRAWS = 2000
RESET_EVERY = 100
"""Of the row that shows what the carried state is worth."""
HEADER = """\
| method | log loss | minus LSTM | CPU us an event | state, bytes |
| --- | --- | --- | --- | --- |
"""


class Row(NamedTuple):
    """One method on the held-out catchments.

    Attributes:
        losses: mean log loss of each catchment.
        cpu_us: processor time of an event, if measured.
        state_bytes: of the state carried for a stream, if one is.
    """

    method: str
    losses: Floats
    cpu_us: float | None = None
    state_bytes: int | None = None


def main() -> None:
    """Read the command line, train or score."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.rivers.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=["train", "score"])
    parser.add_argument(
        "--method", action="append", choices=[*NETWORKS, TREES], help="to train; all by default"
    )
    options = parser.parse_args()
    try:
        if options.step == "train":
            train(options.method or [*NETWORKS, TREES], OUT)
        else:
            text = table(list(score(OUT)))
            (OUT / "comparison.md").write_text(text, encoding="utf-8")
            print(text)
    except ModelsError as error:
        raise SystemExit(f"rivers: {error}") from error


def train(methods: list[str], out: Path) -> None:
    """Fit methods; held-out catchments are not even generated."""
    frame, select = rivers("train"), rivers("select")
    for method in methods:
        if method == TREES:
            for lags in LAGS:
                tune_trees(frame, select, lags).save(out / TREES)
        else:
            train_frame(spec_of(method), frame, out / method, overwrite=True)


def score(out: Path) -> Iterator[Row]:
    """Every method on the held-out catchments, the LSTM first."""
    held_out = rivers("held_out")
    yield from lstm_rows(load_artifact(out / LSTM), held_out)
    for method, events in WINDOWS.items():
        network = Network(load_artifact(out / method))
        losses = by_catchment(held_out, network.probabilities(held_out))
        name = f"convolution over {events} events"
        yield Row(name, losses, network.cpu_us(events, calls=20))
        yield Row(f"{name}, past rows carried", losses, network.cpu_us(1), network.state_bytes)
    for lags in LAGS:
        trees = Trees.load(out / TREES, lags)
        losses = by_catchment(held_out, trees.probabilities(held_out))
        yield Row(f"trees on {lags} events and aggregates", losses, trees.cpu_us(held_out))
    yield base_rate(rivers("train"), held_out)


def lstm_rows(artifact: Artifact, held_out: pl.DataFrame) -> Iterator[Row]:
    """A network with its state carried, and without."""
    network = Network(artifact)
    losses = by_catchment(held_out, network.probabilities(held_out))
    yield Row("stacked LSTM, state carried", losses, network.cpu_us(1), network.state_bytes)
    reset = by_catchment(held_out, network.probabilities(held_out, RESET_EVERY))
    yield Row(f"the same LSTM, reset every {RESET_EVERY} events", reset)


def base_rate(train: pl.DataFrame, held_out: pl.DataFrame) -> Row:
    """The shares of the classes in training."""
    share = np.bincount(codes(train), minlength=len(CLASSES)) / train.height
    return Row("base rate", by_catchment(held_out, np.tile(share, (held_out.height, 1))))


def by_catchment(frame: pl.DataFrame, predicted: Floats) -> Floats:
    """The mean log loss of each catchment after its first year, [catchments]."""
    losses = log_losses(frame, predicted).reshape(frame[STREAM].n_unique(), -1)
    return np.asarray(losses[:, SPIN_UP_DAYS:].mean(axis=1))


def table(rows: list[Row]) -> str:
    """Markdown table; intervals are 95%, by resampling catchments, differences paired."""
    reference = rows[0].losses
    random = np.random.default_rng(0)
    drawn = random.integers(len(reference), size=(DRAWS, len(reference)))
    lines = []
    for row in rows:
        low, high = np.quantile(row.losses[drawn].mean(axis=1), [0.025, 0.975])
        loss = f"{row.losses.mean():.4f} ({low:.4f} to {high:.4f})"
        more = row.losses - reference
        below, above = np.quantile(more[drawn].mean(axis=1), [0.025, 0.975])
        difference = f"{more.mean():+.4f} ({below:+.4f} to {above:+.4f})" if more.any() else ""
        cost = "" if row.cpu_us is None else f"{row.cpu_us:.1f}"
        state = "" if row.state_bytes is None else f"{row.state_bytes:,}"
        lines.append(f"| {row.method} | {loss} | {difference} | {cost} | {state} |\n")
    return HEADER + "".join(lines)


if __name__ == "__main__":
    main()
