"""What detection adds to a call of the network: `python -m tests.bench.detection`.

Calls of a network alone and with detection alternate, on the model of the example with random
weights. Prints microseconds per stream, the median and the fastest call of each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.artifact.artifact import Artifact, write_artifact
from service.engine.runtimes.loading import open_runtimes
from tests.support.detection import sensor_model

SHAPES = ((1, 1), (1, 16), (32, 1), (32, 16), (128, 16))
"""Streams and events of the calls."""
WARM_EVENTS = 200
"""Events of each stream before the first call that counts: more than a season."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every shape with and without a season."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.detection")
    parser.add_argument("--calls", type=int, default=400, help="of each kind")
    options = parser.parse_args(arguments)
    print("| season | streams | events | network us | detecting us | more us | fastest more us |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for season in (None, 96):
            artifact = sensor_model(Path(folder) / f"{season}" / "sensors", season_events=season)
            for streams, events in SHAPES:
                own = measured(artifact, streams, events, options.calls)
                plain, both = (1e6 * np.median(each) / streams for each in own)
                fastest = 1e6 * (min(own[1]) - min(own[0])) / streams
                print(
                    f"| {season or 'none'} | {streams} | {events} | {plain:.1f} | "
                    f"{both:.1f} | {both - plain:.1f} | {fastest:.1f} |"
                )
    return 0


def measured(
    artifact: Artifact, streams: int, events: int, calls: int
) -> tuple[list[float], list[float]]:
    """Seconds of each call of the network alone, and with detection."""
    without = artifact.spec.model_copy(update={"detection": None})
    alone = write_artifact(
        artifact.path.with_name("alone"), without, artifact.weights, overwrite=True
    )
    network, runtime = open_runtimes("onnxruntime", [alone, artifact], 1)
    random = np.random.default_rng(2)
    lengths = np.full(streams, events, np.int32)
    states = np.tile(artifact.runtime_state.initial().floats, (streams, 1))
    plain: list[float] = []
    detected: list[float] = []
    for call in range(calls + WARM_EVENTS // events):
        shape = (streams, events, artifact.spec.input_features)
        rows = random.normal(0, 1, shape).astype(np.float32)
        own = np.ascontiguousarray(states[:, : artifact.network_state.float_size])
        began_s = time.perf_counter()
        network.step(rows, lengths, own)
        between_s = time.perf_counter()
        _, states = runtime.step(rows, lengths, states)
        if call >= WARM_EVENTS // events:
            plain.append(between_s - began_s)
            detected.append(time.perf_counter() - between_s)
    return plain, detected


if __name__ == "__main__":
    sys.exit(main())
