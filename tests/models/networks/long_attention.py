"""Attention over a stream of a million steps, in both runtimes, against float64.

    python -m tests.models.networks.long_attention --plot docs/reference/networks/long-attention.svg

runs one stream in chunks of 1 to 64 steps, its state a float32 row between calls as the store
keeps it, and prints the largest error of a value so far after 10, 100, ... steps: beside what is
promised, |a - b| <= 1e-5 + 1e-5 |b|, and beside the same sums in plain float32.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.model import parse_spec
from service.engine.runtimes.base import Runtime
from service.engine.runtimes.loading import RUNTIMES, open_runtime
from tests.support.oracle import contracting_weights
from tests.support.stepping import step

MOST_STEPS = 64
PLAIN = "float32 sums"
SPEC = parse_spec(
    {
        "name": "long",
        "features": 3,
        "layers": [
            {"kind": "gru", "units": 1},
            {
                "kind": "attention",
                "name": "past",
                "over": "stream",
                "units": 4,
                "inputs": ["features"],
            },
        ],
        "heads": [{"kind": "sequence", "name": "mean", "input": "past"}],
    }
)

Floats = NDArray[np.float32]
Exact = NDArray[np.float64]


def make_artifact(folder: Path) -> Artifact:
    """The model: attention over the rows themselves, so that nothing else adds an error."""
    return write_artifact(folder / "long", SPEC, contracting_weights(SPEC, 5))


def rows_of(steps: int) -> Floats:
    """Rows whose level wanders, float32 [steps, 3]."""
    random = np.random.default_rng(11)
    level = 1 + np.sin(np.arange(steps)[:, np.newaxis] * [1e-5, 3e-5, 1e-4])
    return (random.normal(size=(steps, 3)) + level).astype(np.float32)


def scores_of(artifact: Artifact, rows: Floats) -> Exact:
    """s_t in float64, [steps]."""
    weights = {name: value.astype(np.float64) for name, value in artifact.weights.items()}
    hidden = np.tanh(rows.astype(np.float64) @ weights["past.kernel"] + weights["past.bias"])
    return np.asarray(hidden @ weights["past.context"])


def weighted_means(scores: Exact, rows: Floats, kind: type[np.floating[Any]]) -> Exact:
    """Attention over all steps so far, at every step, with sums in that precision."""
    shares = np.exp(scores - scores.max()).astype(kind)
    total = np.cumsum(shares[:, np.newaxis] * rows.astype(kind), axis=0, dtype=kind)
    return (total / np.cumsum(shares, dtype=kind)[:, np.newaxis]).astype(np.float64)


def run(runtime: Runtime, artifact: Artifact, rows: Floats) -> Floats:
    """The values of one stream, in chunks of 1 to 64 steps, [steps, 3]."""
    random = np.random.default_rng(12)
    state = artifact.state.zero().floats[np.newaxis]
    outputs, at = [], 0
    while at < len(rows):
        length = int(random.integers(1, MOST_STEPS + 1))
        (values,), state = step(runtime, [rows[at : at + length]], state)
        outputs.append(values)
        at += length
    return np.concatenate(outputs)


def measure_errors(artifact: Artifact, steps: int) -> tuple[Exact, dict[str, Exact], Exact]:
    """Measure the largest error so far after each of some steps, by implementation.

    Returns:
        The steps, the errors of each way, and by those steps the least that was promised.
    """
    rows = rows_of(steps)
    scores = scores_of(artifact, rows)
    expected = weighted_means(scores, rows, np.longdouble)
    ways = {PLAIN: weighted_means(scores, rows, np.float32)}
    for name in RUNTIMES:
        runtime = open_runtime(name, artifact, threads=0 if name == "tensorflow" else 1)
        runtime.warm()
        ways[name] = run(runtime, artifact, rows).astype(np.float64)
    marks = np.unique(np.geomspace(1, steps, 61).astype(int))
    errors = {
        name: np.maximum.accumulate(np.abs(values - expected).max(axis=1))[marks - 1]
        for name, values in ways.items()
    }
    promised = (1e-5 + 1e-5 * np.abs(expected)).min(axis=1)
    return marks.astype(float), errors, np.minimum.accumulate(promised)[marks - 1]


def plot_errors(marks: Exact, errors: dict[str, Exact], promised: Exact, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, values in errors.items():
        axes.loglog(marks, np.maximum(values, 1e-9), label=name)
    axes.loglog(marks, promised, "k--", label="promised")
    axes.set(xlabel="steps of the stream", ylabel="largest error of a value so far")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10**6)
    parser.add_argument("--plot", type=Path, help="write the errors as a picture, .svg or .png")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        marks, errors, promised = measure_errors(make_artifact(Path(folder)), options.steps)
    print("| steps | promised | " + " | ".join(errors) + " |")
    print("| --- | --- |" + " --- |" * len(errors))
    decades = [int(np.searchsorted(marks, 10**n)) for n in range(1, 7) if 10**n <= options.steps]
    for at in decades:
        cells = " | ".join(f"{values[at]:.1e}" for values in errors.values())
        print(f"| {int(marks[at]):,} | {promised[at]:.1e} | {cells} |")
    if options.plot is not None:
        plot_errors(marks, errors, promised, options.plot)


if __name__ == "__main__":
    main()
