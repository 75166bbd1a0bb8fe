"""`python -m examples.code.comparison SET`: the next category, from memory and from windows.

Trains the methods that `build/examples/code-comparison/SET` lacks, on the training sequences of a
set (`code`, `sepsis` or `hdfs`, see `examples.code.data`), and prints their losses on the held-out
ones. `docs/explanation/examples.md` fixes the methods and the decision rule. Needs LightGBM:
pip install lightgbm==4.7.0.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray

from examples.code.data import EVENT, ORDER, READERS, SPLITS, STREAM, read_sequences
from examples.code.trees import features, train_trees, tree_losses
from examples.command import BUILT
from models.artifact.artifact import load_artifact
from models.artifact.manifest import MANIFEST_NAME
from models.errors import ModelsError
from models.spec.heads import has_surprise
from models.spec.layout import output_spec, target_categories
from models.spec.model import ModelSpec, parse_spec
from models.training.data import streams_of
from models.training.evaluate import run_network
from models.training.ngrams import Ngrams
from models.training.scores import DayDraws, interval
from models.training.trainer import train

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

OUT = BUILT / "code-comparison"
SPEC = Path(__file__).parent / "spec.yaml"
SEEDS = (1, 2, 3)
ORDERS, DISCOUNTS = (1, 2, 3, 4, 6, 8, 12), (0.7, 0.9)
SMALL = {"batch_streams": 8, "learning_rate": 0.01, "average_decay": 0.98, "patience": 4}
TRAINING: dict[str, dict[str, Any]] = {
    "code": {},
    "sepsis": {**SMALL, "epochs": 30},
    "hdfs": {**SMALL, "epochs": 16, "batch_streams": 32},
}
"""By set, what differs from the training options of `spec.yaml`."""
OTHER_UNITS = 64
"""Of each LSTM, for the sets that are smaller than `code`."""
ROWS = {"code": ((30, ""), (30, "syntax"))}
"""By set, the last events and the further columns of the rows of each kind of trees."""
OTHER_ROWS = ((8, "aggregates"), (20, "aggregates"))
TREE_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "code": {
        "categorical": 30,
        "learning_rate": 0.2,
        "num_leaves": 31,
        "num_iterations": 120,
        "bagging_fraction": 0.4,
        "bagging_freq": 1,
    }
}
"""By set, what differs from the options of all trees."""
MIN_COUNT = 5
"""Categories that training has less often are one category, `<unknown>`, to every method."""
DRAWS = 2000


class Split(NamedTuple):
    """The sequences of one split as codes, the lower ones more frequent in training."""

    codes: list[Codes]
    labels: tuple[str, ...]

    def rows(self, lags: int, further: str) -> tuple[NDArray[np.float32], Codes]:
        """Features and codes of the events of all sequences but the first ones."""
        tables = [features(codes, self.labels, lags, further) for codes in self.codes]
        return np.concatenate(tables), np.concatenate([codes[1:] for codes in self.codes])

    def sequences(self) -> Codes:
        """The number of the sequence of each row."""
        return np.repeat(np.arange(len(self.codes)), [len(codes) - 1 for codes in self.codes])


def main() -> None:
    """Read the command line, train what is missing, score, print."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.code.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("set", choices=READERS)
    parser.add_argument("--folder", type=Path, help="with the file of the set")
    options = parser.parse_args()
    try:
        frame = read_sequences(options.set, options.folder)
        print(f"{frame.height} events; Python {platform.python_version()}")
        print(compare(options.set, frame, OUT / options.set))
    except ModelsError as error:
        raise SystemExit(f"{options.set}: {error}") from error


def spec_of(name: str, frame: pl.DataFrame, seed: int) -> ModelSpec:
    """`spec.yaml` for a set: with its name and its frequent categories."""
    written = yaml.safe_load(SPEC.read_text(encoding="utf-8"))
    counts = frame.filter(pl.col(ORDER) < SPLITS[1])[EVENT].value_counts()
    frequent = counts.filter(pl.col("count") >= MIN_COUNT).sort("count", EVENT, descending=True)
    written["events"]["fields"][0]["vocabulary"] = frequent[EVENT].to_list()
    written["training"].update(TRAINING[name], seed=seed)
    if name != "code":
        for layer in written["layers"][::2]:
            layer["units"] = OTHER_UNITS
    return parse_spec({**written, "name": name})


def splits_of(frame: pl.DataFrame, spec: ModelSpec) -> list[Split]:
    """The sequences of training, choice and test."""
    labels = target_categories(spec, next(filter(has_surprise, spec.heads))).labels
    code = pl.col(EVENT).replace_strict(
        {label: code for code, label in enumerate(labels)}, default=0, return_dtype=pl.Int64
    )
    sequences = frame.with_columns(code).group_by(STREAM, maintain_order=True)
    codes = sequences.agg(EVENT, pl.col(ORDER).first())
    split = np.searchsorted(SPLITS[1:], codes[ORDER].to_list(), side="right")
    return [
        Split([codes[EVENT][int(at)].to_numpy() for at in np.flatnonzero(split == each)], labels)
        for each in range(3)
    ]


def compare(name: str, frame: pl.DataFrame, out: Path) -> str:
    """Train what is missing; a table of every method on the held-out sequences."""
    learned, chosen, test = splits_of(frame, spec_of(name, frame, 1))
    by_seed = [network_losses(name, frame, seed, out / f"lstm-{seed}") for seed in SEEDS]
    losses = {f"stacked LSTM, mean of seeds {', '.join(map(str, SEEDS))}": np.mean(by_seed, axis=0)}
    for lags, further in ROWS.get(name, OTHER_ROWS):
        path, title = out / f"trees-{lags}-{further}.txt", f"trees on {lags} events"
        if not path.exists():
            known, select = (split.rows(lags, further) for split in (learned, chosen))
            options = TREE_OPTIONS.get(name, {})
            train_trees(path, known, select, len(test.labels), **options)
        title += f" and {further}" if further else ""
        rows_of_test = test.rows(lags, further)
        losses[title] = load_or_compute(path.with_suffix(".npy"), tree_losses, path, *rows_of_test)
    settings = product(ORDERS, DISCOUNTS)
    order, discount = min(settings, key=lambda each: ngram_losses(learned, chosen, *each).mean())
    losses[f"n-grams, {order} events back"] = ngram_losses(learned, test, order, discount)
    losses["last event"] = ngram_losses(learned, test, 1, discount)
    losses |= {f"seed {seed}": each for seed, each in zip(SEEDS, by_seed, strict=True)}
    return table(losses, test.sequences())


def load_or_compute(path: Path, compute: Callable[..., Floats], *arguments: Any) -> Floats:
    """Load what a function returned before, or call it and save that: trees take minutes."""
    if not path.exists():
        np.save(path, compute(*arguments))
    return np.asarray(np.load(path))


def ngram_losses(learned: Split, scored: Split, order: int, discount: float) -> Floats:
    """-log p of every row of a split under n-grams that are counted in another."""
    ngrams = Ngrams(learned.codes, len(learned.labels), order, discount)
    return np.concatenate([ngrams.losses(codes)[1:] for codes in scored.codes])


def network_losses(name: str, frame: pl.DataFrame, seed: int, path: Path) -> Floats:
    """-log p of every row of the held-out sequences; trains the network unless it is there."""
    if not (path / MANIFEST_NAME).exists():
        known = frame.filter(pl.col(ORDER) < SPLITS[2])
        train(spec_of(name, known, seed), known, path, overwrite=True, source=name)
    artifact = load_artifact(path)
    test = frame.filter(pl.col(ORDER) >= SPLITS[2])
    streams = streams_of(artifact.spec, test)
    outputs = run_network(artifact.spec, artifact.weights, streams)
    nats: Floats = np.empty(test.height)
    nats[streams.table_rows] = output_spec(artifact.spec).by_name(outputs)["next.surprise"]
    return np.asarray(nats[~test[STREAM].is_first_distinct().to_numpy()])


def table(losses: Mapping[str, Floats], sequences: Codes) -> str:
    """Markdown table; intervals are 95%, by resampling sequences, differences paired."""
    draws, reference = DayDraws.make(sequences, DRAWS, 0), next(iter(losses.values()))
    lines = ["| method | nats an event | minus LSTM |", "| --- | --- | --- |"]
    for name, own in losses.items():
        low, high = interval(draws.means(own - reference))
        more = f"{(own - reference).mean():+.4f} ({low:+.4f} to {high:+.4f})"
        lines.append(f"| {name} | {own.mean():.4f} | {'' if own is reference else more} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
