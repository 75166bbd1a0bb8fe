"""The networks that are measured, what is sent to them, and the check of what they answer.

The standard workload: two stacked LSTM(64) and Dense(8), 16 features, 16 events a chunk. The
other kinds of networks have the same size. Weights are contracting, so that every server's
outputs must equal the tests' float64 oracle within the contract's 1e-5, however the events were
cut and batched. The values of networks whose outputs depend on the cuts are proven on both runtimes
by `tests/service/engine/test_runtime_contract.py`; here their shapes are checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import ormsgpack
import polars as pl
from numpy.typing import NDArray

from models.artifact.artifact import Artifact, load_artifact
from models.artifact.writing import write_artifact
from models.events.encode import Clock, encode
from models.events.frame import columns_from_frame
from models.pretrained.departures import flight_events
from models.spec.model import parse_spec
from service.engine.runtimes.base import Runtime
from service.engine.runtimes.loading import open_runtime
from tests.bench.traffic import (
    PERF,
    Media,
    TrafficSpec,
    WrongReplyError,
    read_grpc_reply,
    read_v2_reply,
)
from tests.support.models import PRETRAINED
from tests.support.oracle import contracting_weights, oracle_step

FEATURES, STEPS, UNITS = 16, 16, 64
BODIES = 8
HORIZON = 24
TARGET = "x0"
PLAIN = "lstm"  # the kind that the others are compared with; its network is the standard one
FEW, MANY = 1_000, 1_000_000  # streams in the store, in the comparison of few and many
COMPUTE_S = 0.3

TOLERANCE = 1e-5
TRAINED_TOLERANCE = 1e-3
"""For weights from training, with heads that exponentiate: the contract's bound is for
contracting networks, and this check is to find wrong answers, not the last digit."""

STREAM_OF_FLIGHTS = "EWR-UA"
CUTS, LONGEST_STEPS = 64, 64

FloatRows = NDArray[np.float32]


def _stack(*layers: dict[str, Any], units: int = UNITS, **rest: Any) -> dict[str, Any]:
    return {"layers": [{"units": units, **layer} for layer in layers], **rest}


def _handing_over(kind: str) -> list[dict[str, Any]]:
    """Two layers, the second starting from what the first returned; chunks are whole."""
    first, second = {"kind": kind, "name": "below"}, {"kind": kind, "name": "above"}
    return [first, {**second, "starts_from": "below"}]


LSTM, GRU = {"kind": "lstm"}, {"kind": "gru"}
WHOLE = {"max_chunk_steps": STEPS}
NUMBERS = [{"kind": "numeric", "name": f"x{n}", "mean": 0.0, "std": 1.0} for n in range(FEATURES)]
KINDS: Mapping[str, Mapping[str, Any]] = {
    PLAIN: _stack(LSTM, LSTM),
    "gru": _stack(GRU, GRU),
    "gru-reset-before": _stack(*[{**GRU, "reset_after": False}] * 2),
    "lstm-peepholes": _stack(*[{**LSTM, "peepholes": True}] * 2),
    "lstm-normalised": _stack(*[{**LSTM, "layer_normalization": True}] * 2),
    "lstm-projected": _stack(*[{**LSTM, "projection": 32}] * 2),
    "hand-off": _stack(*_handing_over("lstm"), **WHOLE),
    "attention-chunk": _stack(LSTM, LSTM, {"kind": "attention", "over": "chunk"}, **WHOLE),
    "attention-stream": _stack(LSTM, LSTM, {"kind": "attention", "over": "stream"}),
    "bidirectional-blocks": _stack(
        *[{"kind": "bidirectional"}] * 2, blocks={"size": 16, "lookahead": 8}
    ),
    "bidirectional-predict": _stack(
        *_handing_over("bidirectional"), {"kind": "attention", "over": "chunk"}, **WHOLE
    ),
    "forecast": _stack(
        LSTM,
        LSTM,
        events={"fields": NUMBERS},
        decoder={
            "targets": [TARGET],
            "layers": [{**LSTM, "units": UNITS, "starts_from": f"lstm_{n}"} for n in (1, 2)],
            "max_horizon": HORIZON,
        },
    ),
}
"""By name, what the specification says beside the name and the head."""


def write_network(folder: Path, name: str, network: Mapping[str, Any]) -> Artifact:
    """Write a network as the artifact `folder/name`."""
    features = {} if "events" in network else {"features": FEATURES}
    heads = [{"kind": "dense", "name": "out", "units": 8}]
    spec = parse_spec({"name": name, **features, "heads": heads, **network})
    return write_artifact(folder / name, spec, contracting_weights(spec, 1))


def standard_model(folder: Path, units: int = UNITS) -> Artifact:
    """Write the standard network as the artifact `folder/bench`."""
    return write_network(folder, "bench", _stack(LSTM, LSTM, units=units))


def flights_model(folder: Path) -> Artifact:
    """The pretrained model as `folder/flights`, packaged again: a graph for every runtime."""
    shipped = load_artifact(PRETRAINED / "flights")
    return write_artifact(folder / "flights", shipped.spec, shipped.weights)


class Rate(NamedTuple):
    """The compute of chunks alone, without a service."""

    chunks_per_s: float
    cpu_us_per_chunk: float


@cache
def _open(name: str, path: Path, threads: int) -> tuple[Artifact, Runtime]:
    """An artifact, and a runtime of it, with everything compiled."""
    artifact = load_artifact(path)
    runtime = open_runtime(name, artifact, threads)
    runtime.warm()
    return artifact, runtime


def measure_step(
    name: str, path: Path, batch: int, steps: int = STEPS, threads: int = 1
) -> Rate | None:
    """A runtime's own step on random rows and states; None where it takes no such batch. Chunks
    that are longer than a call are as many calls, of which one is measured."""
    artifact, runtime = _open(name, path, threads)
    if batch > runtime.max_batch:
        return None
    calls_per_chunk = max(1.0, steps / runtime.max_steps)
    steps = min(steps, runtime.max_steps)
    random, (padded, length) = np.random.default_rng(1), runtime.padded_shape(batch, steps)
    rows = random.normal(size=(padded, length, artifact.spec.input_features)).astype(np.float32)
    states = random.uniform(-1, 1, (padded, artifact.state.float_size)).astype(np.float32)
    arguments = rows, np.full(padded, steps, np.int32), states
    runtime.step(*arguments)
    calls, started_s, cpu_before_s = 0, time.perf_counter(), time.process_time()
    while (passed_s := time.perf_counter() - started_s) < COMPUTE_S or not calls:
        runtime.step(*arguments)
        calls += 1
    cpu_s = time.process_time() - cpu_before_s
    chunks = calls * batch / calls_per_chunk
    return Rate(chunks / passed_s, cpu_s / chunks * 1e6)


@dataclass(frozen=True)
class Bodies:
    """What the chunks hold: blocks of rows, which a stream is sent in turn."""

    rows: tuple[FloatRows, ...]  # [T, F] each
    events: tuple[bytes, ...] | None = None  # the same in JSON; None where the feed is `inputs`

    @classmethod
    def random(cls, steps: int, features: int = FEATURES, count: int = BODIES) -> Bodies:
        """Blocks of `steps` random rows with four decimals."""
        random = np.random.default_rng(steps)
        blocks = random.normal(size=(count, steps, features)).round(4).astype(np.float32)
        return cls(tuple(blocks))

    def values(self, media: Media) -> tuple[bytes, ...]:
        """Each block as the member of a body."""
        if self.events is not None:
            return self.events
        if media not in ("json", "perf-json"):
            return tuple(rows.astype("<f4").tobytes() for rows in self.rows)
        values = (rows if media == "json" else rows.ravel() for rows in self.rows)
        return tuple(orjson.dumps(each, option=orjson.OPT_SERIALIZE_NUMPY) for each in values)


def flights_bodies(artifact: Artifact) -> Bodies:
    """Consecutive real departures, in chunks of 1 to 64, as events and rows."""
    schema = artifact.spec.events
    assert schema is not None
    random = np.random.default_rng(1)
    cuts = random.integers(1, LONGEST_STEPS, CUTS, endpoint=True).tolist()
    frame = flight_events().filter(pl.col("stream") == STREAM_OF_FLIGHTS).head(sum(cuts))
    rows, _ = encode(schema, columns_from_frame(schema, frame), Clock())
    wire = frame.select(
        pl.col(field.name).dt.epoch("ms") if field.kind == "timestamp" else pl.col(field.name)
        for field in schema.fields
    ).to_dicts()
    events = [{name: value for name, value in event.items() if value is not None} for event in wire]
    ends = np.cumsum(cuts).tolist()
    slices = [slice(end - cut, end) for cut, end in zip(cuts, ends, strict=True)]
    written = tuple(orjson.dumps(events[cut]) for cut in slices)
    return Bodies(tuple(rows[cut] for cut in slices), written)


def make_traffic(
    artifact: Artifact,
    bodies: Bodies,
    prefix: str,
    streams: int,
    *,
    media: Media = "json",
    items: int = 0,
    **rest: Any,
) -> TrafficSpec:
    """What a model is sent: chunks, sequences to predict, or forecasts of streams with one chunk;
    further arguments as in `TrafficSpec`."""
    values, steps = bodies.values(media), tuple(map(len, bodies.rows))
    route, member = "streams/{0}/chunks", "inputs" if bodies.events is None else "events"
    if items:
        route = "chunks"
    elif artifact.spec.decoder is not None:
        route, member = "streams/{0}/forecast", "horizon"
        values, steps = (b"%d" % HORIZON,), (HORIZON,)
        rest |= {"position": STEPS, "moves": False}
    elif artifact.spec.chunking == "whole":
        route, member, values = "predict", "sequences", tuple(b'{"inputs":%b}' % v for v in values)
        rest |= {"positions": False}
    # of several models `NAME-0`, `NAME-1` and so on
    model = artifact.spec.name if "models" not in rest else f"{artifact.spec.name[:-2]}-{{1}}"
    path = f"/v1/models/{model}/{route}"
    if media == "v2" or media in PERF:
        path = f"/v2/models/{artifact.spec.name}/infer"
    elif media == "grpc":
        path = artifact.spec.name
    elif media == "websocket":
        path = f"/v1/models/{artifact.spec.name}/live"
    return TrafficSpec(path, media, member, values, steps, prefix, streams, items=items, **rest)


_READ: Mapping[Media, Callable[[bytes], Any]] = {
    "json": orjson.loads,
    "msgpack": ormsgpack.unpackb,
    "v2": read_v2_reply,
    **dict.fromkeys(PERF, read_v2_reply),
    "grpc": read_grpc_reply,
    "websocket": lambda body: ormsgpack.unpackb(body)["reply"],
}


def place_in_bursts(number: int, burst: int, streams: int) -> tuple[int, int]:
    """Stream and position of the n-th event, where the streams have a burst of events in turns."""
    block, at = divmod(number, burst)
    turn, stream = divmod(block, streams)
    return stream, turn * burst + at


def check_answers(
    artifact: Artifact,
    spec: TrafficSpec,
    rows: Sequence[FloatRows],
    sampled: Sequence[bytes],
    tolerance: float = TOLERANCE,
) -> None:
    """Check the replies to stream 0, from its first chunk on; `rows` are those of each body.

    Raises WrongReplyError for another shape or value than the network's, or no reply at all.
    """
    read = _READ[spec.media]
    parts = [_outputs(artifact, read(reply)) for reply in sampled]
    if not parts or not all(np.isfinite(part).all() for part in parts):
        raise WrongReplyError(f"expected finite outputs, got {parts[:1]}")
    model = artifact.spec
    if model.chunking != "invisible" or model.blocks or model.decoder or model.onnx:
        return
    sent = np.concatenate([rows[spec.body(0, chunk)] for chunk in range(len(sampled))])
    oracle, _ = oracle_step(model, artifact.weights, sent, artifact.state.zero().floats)
    # the last columns are the weights of attention, which replies do not show here
    expected = oracle[:, : sum(output.size for output in artifact.outputs.outputs)]
    answers = np.concatenate(parts)
    if answers.shape != expected.shape:
        raise WrongReplyError(f"expected outputs {expected.shape}, got {answers.shape}")
    difference = np.abs(answers - expected)
    if not (difference <= tolerance * (1 + np.abs(expected))).all():
        raise WrongReplyError(
            f"the outputs differ from the oracle's by up to {difference.max():.2g}, "
            f"expected {tolerance:g}"
        )


def _outputs(artifact: Artifact, reply: Mapping[str, Any]) -> Any:
    """The outputs of a reply, float64 [T, O]; of a forecast [H, 1 + Q]."""
    if "forecast" in reply:
        target = reply["forecast"][TARGET]
        return np.column_stack([target["point"], target["quantiles"]]).reshape(HORIZON, -1)
    named = reply["predictions"][0]["outputs"] if "predictions" in reply else reply["outputs"]
    outputs = artifact.outputs.outputs
    columns = [np.asarray(named[one.name], np.float64).reshape(-1, one.size) for one in outputs]
    return np.concatenate(columns, axis=1)
