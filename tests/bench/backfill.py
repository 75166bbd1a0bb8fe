"""What running a model over recorded events costs, beside the network alone and plain loops.

All on one thread, by processor time. The standard network reads 16 numbers of streams whose lengths
follow a power law; the pretrained one reads real departures. Compared are

    network    its step on constant rows, at the fastest of several shapes, on as many events
    table      `Runner.run_table`: encoding, cutting, packing, outputs and states included
    events     a loop over streams and their events: each is encoded, and one call of ONNX Runtime
    streams    a loop over streams: each is encoded, and one call of ONNX Runtime
    predict    `predict` of a Keras model, of encoded streams that are sorted by length and padded
               in batches; of the standard network only
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from models.artifact.artifact import Artifact
from models.events.columns import EventColumns
from models.events.encode import Clock, encode
from models.events.frame import columns_from_frame
from models.offline.runner import EventTable, Runner
from models.offline.steps import Step, open_step
from models.pretrained.departures import flight_events
from models.spec.layout import runtime_state
from models.spec.model import schema_of
from models.spec.state import IntArray
from tests.backfill.histories import History
from tests.bench import workloads
from tests.bench.run import Bench, helper_process

EVENTS, STREAMS = 200_000, 1_000
LOOP_EVENTS, PREDICT_EVENTS = 4_000, 40_000
"""Events that the slow ways run over, of some of the streams, whole."""
SHAPES: Final = ((1, 256), (8, 32), (16, 64), (32, 16), (32, 32), (64, 8), (64, 16), (128, 8))
"""Streams and events of a call of the network."""
PREDICT_BATCH: Final = 32
MOST_DIFFERENCE: Final = 1e-3
NETWORK: Final = "network"


class Recorded(NamedTuple):
    """A model and events of many streams, one stream after the other."""

    artifact: Artifact
    events: EventColumns
    starts: IntArray
    lengths: IntArray

    def few(self, events: int) -> list[EventColumns]:
        """Streams of different lengths, or the beginning of one, of at most so many events."""
        count = max(1, events * len(self.starts) // len(self.events))
        places = (np.arange(count) + 0.5) / count * len(self.starts)
        chosen = np.argsort(self.lengths, kind="stable")[places.astype(np.int64)].tolist()
        ends = (self.starts + np.minimum(self.lengths, events)).tolist()
        return [self.events[int(self.starts[at]) : ends[at]] for at in chosen]


def measure_backfill(bench: Bench, kind: str) -> None:
    """The rate of the offline runner over that of other ways to run the same events."""
    process = bench.start(helper_process(bench.cores.servers))
    for name in ("standard", "flights"):
        arguments = measure_ways, bench.folder / f"backfill-{name}", name, bench.options.rounds
        costs = process.submit(*arguments).result()
        for way, microseconds in costs.items():
            bench.results.figure(f"backfill/{name}: {way}, us CPU/event", microseconds)
        for way, others in costs.items():
            if way != "table":
                ratios = [b / a for a, b in zip(costs["table"], others, strict=True)]
                bench.results.figure(f"backfill/{name}: table over {way}", ratios)


def measure_ways(folder: Path, name: str, rounds: int) -> Mapping[str, list[float]]:
    """CPU microseconds of an event by way, of rounds in turns."""
    recorded = standard_history(folder) if name == "standard" else flights_history(folder)
    artifact = recorded.artifact
    step = open_step(artifact.spec, artifact.weights, threads=1)
    runner = Runner(artifact.spec, artifact.weights, step)
    table = EventTable(recorded.events, recorded.starts)
    loop, whole = recorded.few(LOOP_EVENTS), recorded.few(PREDICT_EVENTS)
    _check(runner, recorded, step, loop)
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "table": (len(recorded.events), lambda: runner.run_table(table)),
        "events": (sum(map(len, loop)), lambda: run_events(artifact, step, loop)),
        "streams": (sum(map(len, whole)), lambda: run_streams(artifact, step, whole)),
    }
    if name == "standard":
        sequences = sorted(_encoded(artifact, whole), key=len)
        model = keras_model(artifact)
        ways["predict"] = (sum(map(len, sequences)), lambda: predict_padded(model, sequences))
        ways["predict"][1]()
    networks = [network_calls(artifact, step, *shape) for shape in SHAPES]
    ways[NETWORK] = EVENTS, min(networks, key=_cpu_us)
    costs: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, (events, run) in ways.items():
            costs[way].append(_cpu_us(run) / events)
    return costs


def standard_history(folder: Path) -> Recorded:
    """The standard network on events with 16 numbers, of streams by a power law."""
    network = {**workloads.KINDS[workloads.PLAIN], "events": {"fields": workloads.NUMBERS}}
    artifact = workloads.write_network(folder / "standard", "standard", network)
    counts = History(events=EVENTS, streams=STREAMS).weights * EVENTS
    lengths = np.maximum(counts.astype(np.int64), 1)
    steps, random = int(lengths.sum()), np.random.default_rng(1)
    random.shuffle(lengths)
    names = [number["name"] for number in workloads.NUMBERS]
    present = dict.fromkeys(names, np.ones(steps, np.bool_))
    values = {name: random.normal(size=steps) for name in names}
    events = EventColumns(steps, present, values)
    return Recorded(artifact, events, np.cumsum(lengths) - lengths, lengths)


def flights_history(folder: Path) -> Recorded:
    """The pretrained model on the departures that it was made of."""
    artifact = workloads.flights_model(folder)
    frame = flight_events().head(EVENTS).sort("stream", maintain_order=True)
    lengths = frame["stream"].rle().struct.field("len").to_numpy().astype(np.int64)
    events = columns_from_frame(schema_of(artifact.spec), frame)
    return Recorded(artifact, events, np.cumsum(lengths) - lengths, lengths)


def run_events(artifact: Artifact, step: Step, streams: list[EventColumns]) -> list[Any]:
    """The outputs of a loop that calls the network for each event."""
    schema, one, outputs = schema_of(artifact.spec), np.ones(1, np.int32), []
    for columns in streams:
        state, clock = runtime_state(artifact.spec).initial().floats[np.newaxis], Clock()
        for at in range(len(columns)):
            rows, clock = encode(schema, columns[at : at + 1], clock)
            values, state = step(rows[np.newaxis], one, state)
            outputs.append(values[0])
    return outputs


def run_streams(artifact: Artifact, step: Step, streams: list[EventColumns]) -> list[Any]:
    """The outputs of a loop that calls the network for each stream."""
    state, outputs = runtime_state(artifact.spec).initial().floats[np.newaxis], []
    for rows in _encoded(artifact, streams):
        values, _ = step(rows[np.newaxis], np.array([len(rows)], np.int32), state)
        outputs.append(values[0])
    return outputs


def keras_model(artifact: Artifact) -> Any:
    """The standard network as a Keras model, on one thread."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    layers = [layer.name for layer in artifact.spec.layers]
    units = workloads.UNITS
    model = keras.Sequential(
        [
            keras.layers.Input((None, workloads.FEATURES)),
            keras.layers.Masking(),
            *(keras.layers.LSTM(units, return_sequences=True, name=name) for name in layers),
            keras.layers.Dense(8, name="out"),
        ]
    )
    for name in layers:
        kinds = ("kernel", "recurrent_kernel", "bias")
        model.get_layer(name).set_weights([artifact.weights[f"{name}.{each}"] for each in kinds])
    dense = [artifact.weights[f"heads.out.{each}"] for each in ("kernel", "bias")]
    model.get_layer("out").set_weights(dense)
    return model


def predict_padded(model: Any, sequences: list[Any]) -> list[Any]:
    """The outputs of `predict`, of sequences that are sorted by length."""
    outputs = []
    for first in range(0, len(sequences), PREDICT_BATCH):
        batch = sequences[first : first + PREDICT_BATCH]
        padded = np.zeros((len(batch), len(batch[-1]), workloads.FEATURES), np.float32)
        for slot, rows in zip(padded, batch, strict=True):
            slot[: len(rows)] = rows
        predicted = model.predict(padded, batch_size=PREDICT_BATCH, verbose=0)
        outputs += [values[: len(rows)] for values, rows in zip(predicted, batch, strict=True)]
    return outputs


def _encoded(artifact: Artifact, streams: list[EventColumns]) -> list[Any]:
    return [encode(schema_of(artifact.spec), each, Clock())[0] for each in streams]


def _check(runner: Runner, recorded: Recorded, step: Step, streams: list[EventColumns]) -> None:
    """Check that the loops and a table of the same streams have the same outputs."""
    lengths = np.array([len(each) for each in streams])
    events = EventColumns.concatenate(streams)
    table = runner.run_table(EventTable(events, np.cumsum(lengths) - lengths)).outputs
    for run in (run_events, run_streams):
        outputs = np.concatenate(run(recorded.artifact, step, streams))
        difference = np.abs(outputs - table).max()
        assert difference < MOST_DIFFERENCE, f"{run.__name__}: {difference}"


def network_calls(artifact: Artifact, step: Step, batch: int, steps: int) -> Callable[[], object]:
    """Calls of the network alone, on as many events as a table has."""
    rows = np.zeros((batch, steps, artifact.spec.input_features), np.float32)
    state = np.tile(runtime_state(artifact.spec).initial().floats, (batch, 1))
    lengths, calls = np.full(batch, steps, np.int32), max(1, EVENTS // (batch * steps))

    def run() -> None:
        for _ in range(calls):
            step(rows, lengths, state)

    return run


def _cpu_us(run: Callable[[], object]) -> float:
    began_s = time.process_time()
    run()
    return (time.process_time() - began_s) * 1e6
