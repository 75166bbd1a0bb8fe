"""`python -m models.examples.rivers.comparison`: carried memory beside windows.

    tune [METHOD ...]   train the candidates of all methods, or of some, on the training catchments
    score               choose by the choosing catchments, score once on the held-out ones

Methods: `lstm`, `tcn-127`, `tcn-511`, `trees`. `docs/decisions/flagship.md` fixes data, candidates
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

from models.errors import ModelsError
from models.examples.command import BUILT
from models.examples.rivers.data import SPIN_UP_DAYS, rivers
from models.examples.rivers.networks import (
    CANDIDATES,
    WINDOWS,
    Network,
    choose_network,
    log_losses,
    train_candidates,
)
from models.examples.rivers.trees import LAGS, Trees, tune_trees
from models.examples.rivers.windows import CLASSES, STREAM, codes

Floats = NDArray[np.float64]

OUT = BUILT / "rivers" / "comparison"
TREES = "trees"
DRAWS = 2000
RESET_EVERY = 100
"""Of the row that shows what the carried state is worth."""
HEADER = """\
| method | candidate | log loss | minus LSTM | CPU us an event |
| --- | --- | --- | --- | --- |
"""


class Row(NamedTuple):
    """One method on the held-out catchments.

    Attributes:
        losses: mean log loss of each catchment.
        cpu_us: processor time of an event.
    """

    method: str
    candidate: str
    losses: Floats
    cpu_us: float


def main() -> None:
    """Read the command line, tune or score."""
    parser = argparse.ArgumentParser(
        prog="python -m models.examples.rivers.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=["tune", "score"])
    parser.add_argument("methods", nargs="*", choices=[*CANDIDATES, TREES], default=[])
    options = parser.parse_args()
    try:
        if options.step == "tune":
            tune(options.methods or [*CANDIDATES, TREES], OUT)
        else:
            text = table(list(score(OUT)))
            (OUT / "comparison.md").write_text(text, encoding="utf-8")
            print(text)
    except ModelsError as error:
        raise SystemExit(f"rivers: {error}") from error


def tune(methods: list[str], out: Path) -> None:
    """Train the candidates; held-out catchments are not even generated."""
    train, select = rivers("train"), rivers("select")
    for method in methods:
        if method == TREES:
            for lags in LAGS:
                tune_trees(train, select, lags).save(out / TREES)
        else:
            train_candidates(method, train, out / method)


def score(out: Path) -> Iterator[Row]:
    """Every method on the held-out catchments, the LSTM first."""
    select, held_out = rivers("select"), rivers("held_out")
    for method in CANDIDATES:
        network = choose_network(method, select, out / method)
        if method not in WINDOWS:
            yield from lstm_rows(network, held_out)
            continue
        events = WINDOWS[method]
        losses = by_catchment(held_out, network.probabilities(held_out))
        window_us = network.cpu_us(events, calls=20)
        yield Row(f"convolution over {events} events", network.candidate, losses, window_us)
        carried = f"the same, {network.state_bytes:,} bytes of past rows carried"
        yield Row(carried, network.candidate, losses, network.cpu_us(1))
    for lags in LAGS:
        trees = Trees.load(out / TREES, lags)
        yield Row(
            f"trees on {lags} events and aggregates",
            f"{trees.rounds} trees a class, {trees.leaves} leaves",
            by_catchment(held_out, trees.probabilities(held_out)),
            trees.cpu_us(held_out),
        )
    yield base_rate(rivers("train"), held_out)


def lstm_rows(network: Network, held_out: pl.DataFrame) -> Iterator[Row]:
    """A network with its state carried, and without."""
    cpu_us = network.cpu_us(1)
    losses = by_catchment(held_out, network.probabilities(held_out))
    name = f"stacked LSTM, {network.state_bytes:,} bytes of state carried"
    yield Row(name, network.candidate, losses, cpu_us)
    reset = by_catchment(held_out, network.probabilities(held_out, RESET_EVERY))
    yield Row(f"the same, reset every {RESET_EVERY} events", network.candidate, reset, cpu_us)


def base_rate(train: pl.DataFrame, held_out: pl.DataFrame) -> Row:
    """The shares of the classes in training."""
    share = np.bincount(codes(train), minlength=len(CLASSES)) / train.height
    return Row("base rate", "", by_catchment(held_out, np.tile(share, (held_out.height, 1))), 0.0)


def by_catchment(frame: pl.DataFrame, predicted: Floats) -> Floats:
    """The mean log loss of each catchment after its first year, [catchments]."""
    losses = log_losses(frame, predicted).reshape(frame[STREAM].n_unique(), -1)
    return np.asarray(losses[:, SPIN_UP_DAYS:].mean(axis=1))


def table(rows: list[Row]) -> str:
    """In Markdown; intervals are 95%, by resampling catchments, differences paired."""
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
        cost = f"{row.cpu_us:.1f}" if row.cpu_us else ""
        lines.append(f"| {row.method} | {row.candidate} | {loss} | {difference} | {cost} |\n")
    return HEADER + "".join(lines)


if __name__ == "__main__":
    main()
