"""A bidirectional network on a stream against the same network on the whole sequence.

Two bidirectional LSTM layers with fresh weights read one sequence of random events, once whole and
once as a stream in blocks of C with a lookahead of R. Prints the root mean square of the difference
of their outputs, relative to that of the whole network's; with `--plot FILE` it is drawn too.

python -m tests.models.networks.block_lookahead --plot docs/reference/networks/block-lookahead.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.networks.initial_weights import draw_weights
from models.onnx.graph import write_graph
from models.onnx.library import onnxruntime
from models.spec.blocks import BlockSpec, cut_blocks
from models.spec.layout import network_state
from models.spec.model import ModelSpec, parse_spec

STEPS, FEATURES, UNITS = 1024, 8, 32
SIZES = (4, 16, 64)
LOOKAHEADS = (0, 1, 2, 4, 8, 16, 32, 64)
SEED = 1

Floats = NDArray[np.float32]


def network(blocks: BlockSpec | None) -> ModelSpec:
    """The network of this page, whole or in blocks."""
    layers: list[dict[str, Any]] = [{"kind": "bidirectional", "units": UNITS}] * 2
    heads = [{"kind": "sequence", "name": "last"}]
    data = {"name": "m", "features": FEATURES, "layers": layers, "heads": heads, "blocks": blocks}
    return parse_spec(data)


def outputs(spec: ModelSpec, rows: Floats) -> Floats:
    """The outputs [T, O] of a stream of these rows, or of the whole sequence."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    graph = write_graph(spec, draw_weights(spec, SEED))
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    state = np.zeros((1, network_state(spec).float_size), np.float32)
    windows = [rows] if spec.blocks is None else cut_blocks(spec.blocks, rows, final=True).windows
    steps = len(rows) if spec.blocks is None else spec.blocks.window
    outputs_by_window = []
    for window in windows:
        padded = np.zeros((1, steps, FEATURES), np.float32)
        padded[0, : len(window)] = window
        inputs = {"rows": padded, "lengths": np.array([len(window)], np.int32), "states": state}
        output, state = session.run(["outputs", "states_after"], inputs)
        outputs_by_window.append(output[0, : len(window)])
    return np.concatenate(outputs_by_window)


def differences(steps: int = STEPS) -> dict[int, list[float]]:
    """By C, the relative difference at each R of `LOOKAHEADS`."""
    rows = np.random.default_rng(SEED).normal(size=(steps, FEATURES)).astype(np.float32)
    whole = outputs(network(None), rows)
    return {
        size: [
            float(
                np.sqrt(np.mean((outputs(network(_blocks(size, ahead)), rows) - whole) ** 2))
                / np.sqrt(np.mean(whole**2))
            )
            for ahead in LOOKAHEADS
        ]
        for size in SIZES
    }


def _blocks(size: int, lookahead: int) -> BlockSpec:
    return BlockSpec(size=size, lookahead=lookahead)


def draw(errors: dict[int, list[float]], path: Path) -> None:
    """The plot of the table."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "carry"
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for size, values in errors.items():
        axes.plot(LOOKAHEADS, values, "o-", label=f"C = {size}")
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_yscale("log")
    axes.set_xticks(LOOKAHEADS, [str(ahead) for ahead in LOOKAHEADS])
    axes.set(xlabel="lookahead R, events", ylabel="difference to the whole sequence, relative")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the table, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plot", type=Path)
    plot: Path | None = parser.parse_args().plot
    errors = differences()
    print("| R | " + " | ".join(f"C = {size}" for size in SIZES) + " |")
    print("| --- |" + " --- |" * len(SIZES))
    for index, ahead in enumerate(LOOKAHEADS):
        cells = " | ".join(f"{values[index]:.1e}" for values in errors.values())
        print(f"| {ahead} | {cells} |")
    if plot is not None:
        draw(errors, plot)


if __name__ == "__main__":
    main()
