"""`python -m examples.code.comparison`: the next category, from memory and from windows.

    train SET    fit all methods, or those of --method, to the training sequences of a set
    score SET    score them on the held-out sequences

Sets: `code`, `sepsis`, `hdfs` (`examples.code.data`). `docs/explanation/examples.md` fixes the
methods and the decision rule. Needs LightGBM: pip install lightgbm==4.7.0. Writes to
`build/examples/code-comparison/SET`; `score` prints the table and writes it there too.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
import yaml
from numpy.typing import NDArray

from examples.code.data import EVENT, ORDER, SETS, SPLITS, STREAM, read_sequences
from examples.code.trees import Trees, features
from examples.command import BUILT
from models.artifact.artifact import load_artifact
from models.errors import ModelsError
from models.spec.heads import has_surprise
from models.spec.layout import output_spec, target_categories
from models.spec.model import ModelSpec, parse_spec
from models.training.data import streams_of
from models.training.evaluate import run_network
from models.training.ngrams import Ngrams
from models.training.trainer import train

Floats = NDArray[np.float64]
Losses = list[Floats]
"""-log p of the events of each sequence but its first."""

OUT = BUILT / "code-comparison"
SPEC = Path(__file__).parent / "spec.yaml"
LSTM, TREES, NGRAMS = METHODS = ("lstm", "trees", "n-grams")
SEEDS = (1, 2, 3)
ORDERS, DISCOUNTS = (1, 2, 3, 4, 6, 8, 12), (0.7, 0.9)
TRAINING: dict[str, dict[str, Any]] = {
    "code": {},
    "sepsis": {"epochs": 30},
    "hdfs": {"epochs": 16, "batch_streams": 32},
}
"""By set, what differs from the training options of `spec.yaml`."""
ROWS = {"code": ((30, ""), (30, "syntax"))}
"""By set, the last events and the further columns of the rows of each kind of trees."""
OTHER_ROWS = ((8, "aggregates"), (20, "aggregates"))
TREE_OPTIONS: dict[str, dict[str, Any]] = {
    "code": {"categorical": 30, "learning_rate": 0.15, "num_iterations": 100}
}
"""By set, what differs from the options of all trees."""
MIN_COUNT = 5
"""Categories that training has less often are one category, `<unknown>`, to every method."""
DRAWS = 2000
HEADER = "| method | nats an event | minus LSTM |\n| --- | --- | --- |\n"


@dataclass(frozen=True)
class Split:
    """The sequences of one split as codes, the lower ones more frequent in training."""

    codes: list[NDArray[np.int64]]
    labels: tuple[str, ...]

    def rows(self, lags: int, further: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features and codes of the events of all sequences but the first ones."""
        tables = [features(codes, self.labels, lags, further) for codes in self.codes]
        return np.concatenate(tables), np.concatenate([codes[1:] for codes in self.codes])

    def cut(self, losses: Floats) -> Losses:
        """The losses of `rows` by sequence."""
        return np.split(losses, np.cumsum([len(codes) - 1 for codes in self.codes])[:-1])


def main() -> None:
    """Read the command line, train or score."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.code.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=["train", "score"])
    parser.add_argument("set", choices=SETS)
    parser.add_argument(
        "--method", action="append", choices=METHODS, help="to train; all by default"
    )
    parser.add_argument("--folder", type=Path, help="with the file of the set")
    options = parser.parse_args()
    out = OUT / options.set
    try:
        frame = read_sequences(options.set, options.folder)
        print(f"{frame.height} events; Python {platform.python_version()}")
        if options.step == "train":
            known = frame.filter(pl.col(ORDER) < SPLITS[2])
            fit(options.set, known, out, options.method or METHODS)
        else:
            text = table(dict(score(options.set, frame, out)))
            (out / "comparison.md").write_text(text, encoding="utf-8")
            print(text)
    except ModelsError as error:
        raise SystemExit(f"{options.set}: {error}") from error


def spec_of(name: str, frame: pl.DataFrame, seed: int) -> ModelSpec:
    """`spec.yaml` for a set: with its name and its frequent categories."""
    written = yaml.safe_load(SPEC.read_text(encoding="utf-8"))
    counts = frame.filter(pl.col(ORDER) < SPLITS[1])[EVENT].value_counts()
    frequent = counts.filter(pl.col("count") >= MIN_COUNT).sort("count", EVENT, descending=True)
    written["events"]["fields"][0]["vocabulary"] = frequent[EVENT].to_list()
    written["training"].update(TRAINING[name], seed=seed)
    return parse_spec({**written, "name": name})


def split_of(frame: pl.DataFrame, spec: ModelSpec, number: int) -> Split:
    """The sequences of a split: 0 is training, 1 choice, 2 test."""
    ends = (*SPLITS, "9999")
    own = frame.filter((pl.col(ORDER) >= ends[number]) & (pl.col(ORDER) < ends[number + 1]))
    labels = target_categories(spec, next(filter(has_surprise, spec.heads))).labels
    code = pl.col(EVENT).replace_strict(
        {label: code for code, label in enumerate(labels)}, default=0, return_dtype=pl.Int64
    )
    codes = own.with_columns(code).sort(STREAM, ORDER).group_by(STREAM, maintain_order=True)
    return Split([each.to_numpy() for each in codes.agg(EVENT)[EVENT]], labels)


def fit(name: str, frame: pl.DataFrame, out: Path, methods: Sequence[str]) -> None:
    """Fit some methods; `frame` has no held-out sequence."""
    out.mkdir(parents=True, exist_ok=True)
    spec = spec_of(name, frame, 1)
    learned, chosen = split_of(frame, spec, 0), split_of(frame, spec, 1)
    tried: dict[str, float] = {}
    for order, discount in product(ORDERS, DISCOUNTS) if NGRAMS in methods else ():
        ngrams = Ngrams(learned.codes, len(learned.labels), order, discount)
        losses = np.concatenate([ngrams.losses(codes)[1:] for codes in chosen.codes])
        tried[f"{order} {discount}"] = float(losses.mean())
    _note(out / f"{NGRAMS}.json", tried)
    for seed in SEEDS if LSTM in methods else ():
        train(spec_of(name, frame, seed), frame, out / f"lstm-{seed}", overwrite=True, source=name)
    tried = {}
    for kind in ROWS.get(name, OTHER_ROWS) if TREES in methods else ():
        trees = Trees(len(learned.labels), **TREE_OPTIONS.get(name, {}))
        trees.fit(learned.rows(*kind), chosen.rows(*kind))
        trees.save(out / f"trees-{kind}.txt")
        tried[str(kind)] = float(trees.losses(*chosen.rows(*kind)).mean())
    _note(out / f"{TREES}.json", tried)


def _note(path: Path, tried: dict[str, float]) -> None:
    """Write the loss of each setting on the second split, if any was tried."""
    if tried:
        path.write_bytes(orjson.dumps(tried, option=orjson.OPT_INDENT_2))


def score(name: str, frame: pl.DataFrame, out: Path) -> Iterator[tuple[str, Losses]]:
    """Every method on the held-out sequences; of the LSTM the mean over its seeds, and each."""
    by_seed = [_network_losses(frame, out / f"lstm-{seed}") for seed in SEEDS]
    yield (
        "stacked LSTM, mean of three seeds",
        [np.mean(each, axis=0) for each in zip(*by_seed, strict=True)],
    )
    spec = load_artifact(out / "lstm-1").spec
    learned, test = split_of(frame, spec, 0), split_of(frame, spec, 2)
    for lags, further in ROWS.get(name, OTHER_ROWS):
        trees = Trees(len(learned.labels)).load(out / f"trees-{lags, further}.txt")
        losses = test.cut(trees.losses(*test.rows(lags, further)))
        yield f"trees on {lags} events" + (f" and {further}" if further else ""), losses
    tried: dict[str, float] = orjson.loads((out / f"{NGRAMS}.json").read_bytes())
    order, discount = min(tried, key=lambda setting: tried[setting]).split()
    for title, each in ((f"n-grams, {order} events back", int(order)), ("last event", 1)):
        ngrams = Ngrams(learned.codes, len(learned.labels), each, float(discount))
        yield title, [ngrams.losses(codes)[1:] for codes in test.codes]
    for seed, losses_of in zip(SEEDS, by_seed, strict=True):
        yield f"stacked LSTM, seed {seed}", losses_of


def _network_losses(frame: pl.DataFrame, path: Path) -> Losses:
    artifact = load_artifact(path)
    streams = streams_of(artifact.spec, frame.filter(pl.col(ORDER) >= SPLITS[2]))
    outputs = run_network(artifact.spec, artifact.weights, streams)
    nats = output_spec(artifact.spec).by_name(outputs)["next.surprise"].astype(np.float64)
    return [nats[start + 1 : stop] for start, stop in streams.spans]


def table(rows: dict[str, Losses]) -> str:
    """Markdown table; intervals are 95%, by resampling sequences, differences paired."""
    reference = next(iter(rows.values()))
    sizes = np.array([len(losses) for losses in reference])
    drawn = np.random.default_rng(0).integers(len(sizes), size=(DRAWS, len(sizes)))
    lines = []
    for name, losses in rows.items():
        sums = np.array([each.sum() for each in losses])
        more = sums - np.array([each.sum() for each in reference])
        text = f"| {name} | {float(sums.sum()) / int(sizes.sum()):.4f} |"
        if more.any():
            low, high = np.quantile(
                more[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [0.025, 0.975]
            )
            text += f" {float(more.sum()) / int(sizes.sum()):+.4f} ({low:+.4f} to {high:+.4f}) |"
        else:
            text += " |"
        lines.append(text)
    return HEADER + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
