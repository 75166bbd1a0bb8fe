"""The networks of the comparison: stacked LSTMs, and temporal convolutions over a window.

`carry train` trains all of them, with the options of `spec.yaml`; only their layers differ.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray

from examples.rivers.windows import CLASSES, codes
from models.artifact.artifact import Artifact
from models.errors import ArtifactError
from models.onnx.library import open_session
from models.onnx.messages import LENGTHS, OUTPUTS, ROWS, STATES, STATES_AFTER
from models.spec.model import ModelSpec, parse_spec
from models.training.data import streams_of
from models.training.evaluate import run_network

SPEC = Path(__file__).parent / "spec.yaml"
MIN_PROBABILITY = 1e-6
KERNEL = 3
Layers = list[dict[str, Any]]


def stacked_lstm(units: int) -> Layers:
    """Two LSTMs, the upper one on the outputs of the lower one."""
    return [{"kind": "lstm", "units": units}, {"kind": "lstm", "units": units}]


def convolution(units: int, levels: int) -> Layers:
    """A temporal convolutional network (Bai et al. 2018): residual, dilations doubling by level.

    It sees 2 ** (levels + 1) - 1 events, the event itself included.
    """
    layers: Layers = [{"kind": "dense", "name": "level_0", "units": units}]
    for level in range(levels):
        below, above = f"level_{level}", f"level_{level + 1}"
        layers += [
            {
                "kind": "conv1d",
                "name": f"past_{level}",
                "inputs": [below],
                "units": units,
                "kernel_size": KERNEL,
                "dilation": 2**level,
                "activation": "relu",
            },
            {"kind": "dense", "name": f"mixed_{level}", "units": units},
            {"kind": "add", "name": above, "inputs": [below, f"mixed_{level}"]},
        ]
    return [*layers, {"kind": "dense", "units": units, "activation": "relu"}]


LSTM = "lstm"
NETWORKS: Mapping[str, Layers] = {
    LSTM: stacked_lstm(48),
    "tcn-127": convolution(40, 6),
    "tcn-511": convolution(40, 8),
}
"""By method, its layers; those of the LSTM are those of `spec.yaml`."""
WINDOWS = {"tcn-127": 127, "tcn-511": 511}


@dataclass(frozen=True, slots=True)
class Network:
    """A trained network."""

    artifact: Artifact

    def probabilities(
        self, frame: pl.DataFrame, reset_every: int | None = None
    ) -> NDArray[np.float64]:
        """Of every event, as the service computes them in chunks, [rows, classes]."""
        spec = self.artifact.spec.model_copy(update={"reset_every": reset_every})
        return probabilities(spec, self.artifact.weights, frame)

    @property
    def state_bytes(self) -> int:
        """Of the recurrent state that is carried from event to event."""
        return 4 * self.artifact.network_state.float_size

    def cpu_us(self, steps: int, batch: int = 64, calls: int = 200) -> float:
        """Processor time of ONNX Runtime for one event in a batch of streams.

        Args:
            steps: 1 continues from a carried state; more compute a window again.
            batch: streams of a call.
            calls: calls that are measured.
        """
        graph, where = self.artifact.graphs.data, str(self.artifact.path)
        if graph is None:
            raise ArtifactError(f"{where}: no graph can represent it")
        session = open_session(graph, 1, where)
        feeds = {
            ROWS: np.zeros((batch, steps, self.artifact.spec.input_features), np.float32),
            LENGTHS: np.full(batch, steps, np.int32),
            STATES: np.zeros((batch, self.artifact.network_state.float_size), np.float32),
        }
        session.run([OUTPUTS, STATES_AFTER], feeds)
        start = time.process_time()
        for _ in range(calls):
            session.run([OUTPUTS, STATES_AFTER], feeds)
        return (time.process_time() - start) / calls / batch * 1e6


def spec_of(method: str) -> ModelSpec:
    """`spec.yaml` with the layers of a method."""
    written = yaml.safe_load(SPEC.read_text(encoding="utf-8"))
    return parse_spec({**written, "layers": NETWORKS[method]})


def probabilities(
    spec: ModelSpec, weights: Mapping[str, NDArray[np.float32]], frame: pl.DataFrame
) -> NDArray[np.float64]:
    """A model's probabilities in the order of the table, [rows, classes]."""
    streams = streams_of(spec, frame)
    outputs = np.empty((frame.height, len(CLASSES)), np.float64)
    outputs[streams.table_rows] = run_network(spec, weights, streams, chunk=256)
    return outputs


def log_losses(frame: pl.DataFrame, predicted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of every event, in nats, [rows]."""
    true = predicted[np.arange(frame.height), codes(frame)]
    return -np.log(np.clip(true, MIN_PROBABILITY, 1))
