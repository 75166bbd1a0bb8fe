"""What detection costs: more time of a call of the network, and more CPU of a served chunk."""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from models.artifact.writing import write_artifact
from models.training.defaults import BACKOFF_NATS, CLOSE_ABOVE, HOLD_EVENTS
from service.engine.runtimes.loading import open_runtimes
from tests.bench.run import CONNECTIONS, Bench, Row, helper_process
from tests.bench.workloads import BODIES, STEPS, UNITS, Bodies, make_traffic
from tests.support.detection import sensor_model, target_names

SEASON: Final = 96
"""Events of a season."""
CALLS = 400
"""Calls of each shape."""
SHAPES: Final = ((1, 1), (1, 16), (32, 1), (32, 16), (128, 16))
"""Streams and events of a call."""
WARM_EVENTS: Final = 200
"""Events of each stream before the calls: more than a season."""
TARGETS: Final = (1, 4)
ALARM: Final = {
    "hold_events": HOLD_EVENTS,
    "close_above": CLOSE_ABOVE,
    "backoff_nats": BACKOFF_NATS,
}
"""As `carry train` writes it into a model."""
START_MS, INTERVAL_MS = 1_790_000_000_000, 900_000


def measure_detection(bench: Bench, kind: str) -> None:
    """What detection adds to a call of the network, without a service; no runtime but ONNX's; and
    the CPU of a served chunk with detection over that without, in turns."""
    process = bench.start(helper_process(bench.cores.servers))
    for season in (None, SEASON):
        folder = bench.folder / f"detection-{season}"
        calls = process.submit(measure_calls, folder, season, CALLS).result()
        for (streams, events), (plain, detected) in calls.items():
            name = f"detection/{streams} x {events}, {'a' if season else 'no'} season, us/stream"
            per_stream = 1e6 / streams
            bench.results.figure(f"{name} of the network", plain * per_stream)
            bench.results.figure(f"{name} more", (detected - plain) * per_stream)
            fastest = (detected.min() - plain.min()) * per_stream
            bench.results.figure(f"{name} more, fastest", [fastest])
    artifacts, folder = {}, bench.folder / "served"
    for targets, is_on in product(TARGETS, (True, False)):
        fitted = sensor_model(
            bench.folder / f"fitted-{targets}-{is_on}", UNITS, targets, alarm=ALARM
        )
        # a head of zeros gives the forecasts that detection is fitted to, so that alarms are rare
        zeros = {name: 0 * fitted.weights[name] for name in fitted.weights if "heads." in name}
        name = f"{'with' if is_on else 'without'}-{targets}"
        changes = {"name": name} | ({} if is_on else {"detection": None})
        spec = fitted.spec.model_copy(update=changes)
        artifacts[name] = write_artifact(folder / name, spec, {**fitted.weights, **zeros})
    server = bench.start_server(kind, artifacts[name], models=folder)
    for targets in TARGETS:
        rows, bodies = [], _bodies(targets)
        for key in (f"with-{targets}", f"without-{targets}"):
            # each connection has a stream, so that the streams have a past
            bench.warm(server, key, make_traffic(artifacts[key], bodies, key, CONNECTIONS))
            rows.append(Row(f"detection/{CONNECTIONS}/{key}", server, key))
        name = f"detection/served, {targets} target(s): CPU of a chunk with over without"
        bench.results.ratio(name, *bench.measure_rounds(rows), "cpu_us_per_chunk")


def _bodies(targets: int) -> Bodies:
    """Chunks of events of random values."""
    values = np.random.default_rng(2).normal(size=(BODIES, STEPS, targets)).round(3)
    names = ("time", *target_names(targets))
    times = (START_MS + INTERVAL_MS * np.arange(STEPS)).tolist()
    blocks = [
        [
            dict(zip(names, (at, *event), strict=True))
            for at, event in zip(times, block, strict=True)
        ]
        for block in values.tolist()
    ]
    return Bodies(tuple(values.astype(np.float32)), tuple(map(orjson.dumps, blocks)))


def measure_calls(
    folder: Path, season: int | None, calls: int
) -> dict[tuple[int, int], tuple[Any, Any]]:
    """By streams and events of a call, the seconds of calls of a network alone and of the same with
    detection, which alternate; on the model of the example with random weights."""
    artifact = sensor_model(folder / "sensors", season_events=season, alarm=ALARM)
    without = artifact.spec.model_copy(update={"detection": None})
    alone = write_artifact(folder / "alone", without, artifact.weights)
    network, runtime = open_runtimes("onnxruntime", [alone, artifact], 1)
    random, measured = np.random.default_rng(2), {}
    for streams, events in SHAPES:
        lengths = np.full(streams, events, np.int32)
        states = np.tile(artifact.runtime_state.initial().floats, (streams, 1))
        times = []
        for _ in range(calls + WARM_EVENTS // events):
            shape = (streams, events, artifact.spec.input_features)
            rows = random.normal(0, 1, shape).astype(np.float32)
            own = np.ascontiguousarray(states[:, : artifact.network_state.float_size])
            began_s = time.perf_counter()
            network.step(rows, lengths, own)
            between_s = time.perf_counter()
            _, states = runtime.step(rows, lengths, states)
            times.append((between_s - began_s, time.perf_counter() - between_s))
        plain, detected = np.array(times[-calls:]).T
        measured[streams, events] = plain, detected
    return measured
