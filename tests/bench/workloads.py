"""The networks that are measured, the bodies sent to them, and the check of their answers.

The standard workload: two stacked LSTM(64) and Dense(8), 16 features, 16 events a chunk. The
other kinds of networks have the same size. Weights are contracting, so that every server's
outputs must equal the tests' float64 oracle within the contract's 1e-5, however the events were
cut and batched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import ormsgpack
from numpy.typing import NDArray

from models.artifact.artifact import Artifact, write_artifact
from models.spec.model import parse_spec
from models.spec.state import State
from service.core.values import Feed, LastChunk, StreamHead, StreamState
from tests.bench.traffic import Media, Sampled, TrafficSpec, packed_binary
from tests.support.decoder_oracle import oracle_decode
from tests.support.oracle import contracting_weights, oracle_in_blocks, oracle_step

FEATURES, STEPS, UNITS = 16, 16, 64
BODIES = 8
HORIZON = 24
TARGET = "x0"
PLAIN = "lstm"
"""The kind that the others are compared with; its network is the standard one."""

TOLERANCE = 1e-5
TRAINED_TOLERANCE = 1e-3
"""For weights from training, with heads that exponentiate: the contract's bound is for
contracting networks, and this check is to find wrong answers, not the last digit."""

FloatRows = NDArray[np.float32]
Floats = NDArray[np.float64]


def _stack(*layers: dict[str, Any], units: int = UNITS, **rest: Any) -> dict[str, Any]:
    return {"layers": [{"units": units, **layer} for layer in layers], **rest}


def _handing_over(kind: str) -> list[dict[str, Any]]:
    """Two layers, the second starting from what the first returned; chunks are whole."""
    return [
        {"kind": kind, "name": "below"},
        {"kind": kind, "name": "above", "starts_from": "below"},
    ]


LSTM = {"kind": "lstm"}
WHOLE = {"max_chunk_steps": STEPS}
KINDS: Mapping[str, Mapping[str, Any]] = {
    PLAIN: _stack(LSTM, LSTM),
    "gru": _stack(*[{"kind": "gru"}] * 2),
    "gru-reset-before": _stack(*[{"kind": "gru", "reset_after": False}] * 2),
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
        events={
            "fields": [
                {"kind": "numeric", "name": f"x{n}", "mean": 0.0, "std": 1.0}
                for n in range(FEATURES)
            ]
        },
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


def random_stream(seed: int, floats: int, fingerprint: bytes) -> StreamState:
    """A stream after one chunk, with a random state."""
    random = np.random.default_rng(seed)
    values = random.uniform(-1, 1, floats).astype(np.float32)
    return StreamState(
        head=StreamHead(random.bytes(8), random.bytes(16), STEPS),
        feed=Feed.INPUTS,
        fingerprint=fingerprint,
        last=LastChunk(0, random.bytes(16)),
        updated_ms=1_700_000_000_000,
        state=State(values, np.zeros(0, np.int64)),
    )


@dataclass(frozen=True)
class Bodies:
    """What the chunks hold: blocks of rows, which a stream is sent in turn.

    Attributes:
        rows: float32 [T, F] each.
        events: the same as events, written as JSON; None where the feed is `inputs`.
    """

    rows: tuple[FloatRows, ...]
    events: tuple[bytes, ...] | None = None

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
        if media == "msgpack":
            return tuple(packed_binary(rows.astype("<f4").tobytes()) for rows in self.rows)
        return tuple(orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY) for rows in self.rows)

    def traffic(
        self,
        prefix: str,
        streams: int,
        *,
        model: str = "bench",
        media: Media = "json",
        items: int = 0,
        **rest: Any,
    ) -> TrafficSpec:
        """What a generator sends to one server: its own streams, named by `prefix`."""
        single = f"/v1/models/{model}/streams/%b/chunks"
        return TrafficSpec(
            path=(f"/v1/models/{model}/chunks" if items else single).encode(),
            media=media,
            member="inputs" if self.events is None else "events",
            values=self.values(media),
            steps=tuple(map(len, self.rows)),
            prefix=prefix,
            streams=streams,
            items=items,
            **rest,
        )


def traffic_of(
    artifact: Artifact, bodies: Bodies, prefix: str, streams: int, sampled: int = 0
) -> TrafficSpec:
    """What a kind is sent: chunks, sequences to predict, or forecasts of streams with one chunk."""
    model = artifact.spec.name
    common: Any = {"media": "json", "prefix": prefix, "streams": streams, "sampled": sampled}
    if artifact.spec.decoder is not None:
        return TrafficSpec(
            path=f"/v1/models/{model}/streams/%b/forecast".encode(),
            member="horizon",
            values=(b"%d" % HORIZON,),
            steps=(HORIZON,),
            position=STEPS,
            moves=False,
            **common,
        )
    if artifact.spec.chunking == "whole":
        return TrafficSpec(
            path=f"/v1/models/{model}/predict".encode(),
            member="sequences",
            values=tuple(b'{"inputs":%b}' % value for value in bodies.values("json")),
            steps=tuple(map(len, bodies.rows)),
            positions=False,
            **common,
        )
    return bodies.traffic(prefix, streams, model=model, sampled=sampled)


class WrongOutputsError(Exception):
    """A server's outputs are not the network's."""


def check_answers(
    artifact: Artifact,
    spec: TrafficSpec,
    rows: Sequence[FloatRows],
    sampled: Sequence[Sampled],
    tolerance: float = TOLERANCE,
) -> int:
    """Compare sampled replies of streams that began in this run with the model's definition.

    That is one whole run of each stream; where the cuts count one run of each chunk, from the
    state of the one before; of a model of whole sequences one run of each, from the zero state;
    of a forecast the decoder's steps from the stream's one chunk.

    Args:
        rows: the encoded rows of each body, in a stream's own order of bodies.
        sampled: chunks of each stream without a gap from its first.

    Returns:
        How many events' outputs, or steps ahead, were compared.

    Raises:
        WrongOutputsError: with the largest difference.
    """
    if artifact.spec.decoder is not None:
        return sum(_check_forecast(artifact, rows, reply) for reply in sampled)
    compared = 0
    for stream in sorted({reply.stream for reply in sampled}):
        replies = sorted((r for r in sampled if r.stream == stream), key=lambda r: r.chunk)
        if [reply.chunk for reply in replies] != list(range(len(replies))):
            raise WrongOutputsError(f"stream {stream}: replies are missing")
        sent = [rows[spec.body(stream, reply.chunk)] for reply in replies]
        outputs = _read_outputs(artifact, spec.media, [reply.reply for reply in replies])
        _compare(f"stream {stream}", outputs, _expected_outputs(artifact, sent), tolerance)
        compared += len(outputs)
    return compared


def _check_forecast(artifact: Artifact, rows: Sequence[FloatRows], sampled: Sampled) -> int:
    spec, weights = artifact.spec, artifact.weights
    zero = artifact.network_state.zero().floats
    _, state = oracle_step(spec, weights, rows[sampled.stream % len(rows)], zero)
    point, quantiles = oracle_decode(spec, weights, state, np.zeros((HORIZON, 0), np.float32))
    forecast = orjson.loads(sampled.reply)["forecast"][TARGET]
    what = f"forecast of stream {sampled.stream}"
    _compare(what, np.asarray(forecast["point"], np.float64), point[:, 0])
    _compare(what, np.asarray(forecast["quantiles"], np.float64), quantiles[:, 0])
    return HORIZON


def _compare(what: str, outputs: Floats, expected: Floats, tolerance: float = TOLERANCE) -> None:
    if outputs.shape != expected.shape:
        raise WrongOutputsError(f"{what}: expected outputs {expected.shape}, got {outputs.shape}")
    difference = np.abs(outputs - expected)
    if not (difference <= tolerance * (1 + np.abs(expected))).all():
        raise WrongOutputsError(
            f"{what}: the outputs differ from one whole run by up to {difference.max():.2g}, "
            f"expected {tolerance:g}"
        )


def _expected_outputs(artifact: Artifact, chunks: Sequence[FloatRows]) -> Floats:
    """The outputs of a new stream for some chunks: all [T, O], or one a chunk [K, O]."""
    spec, weights, zero = artifact.spec, artifact.weights, artifact.network_state.zero().floats
    if spec.blocks is not None:
        rows = np.concatenate(chunks)
        size, lookahead = spec.blocks.size, spec.blocks.lookahead
        due = max(0, len(rows) - lookahead) // size * size
        return oracle_in_blocks(spec, weights, rows)[:due]
    if spec.chunking == "invisible":
        return oracle_step(spec, weights, np.concatenate(chunks), zero)[0]
    names = artifact.outputs.outputs
    width, is_per_chunk = sum(o.size for o in names), all(o.per == "chunk" for o in names)
    outputs, state = [], zero.astype(np.float64)
    for rows in chunks:
        # The last columns are the weights of attention, which replies do not show here.
        whole, after = oracle_step(spec, weights, rows, state)
        outputs.append(whole[-1:, :width] if is_per_chunk else whole[:, :width])
        state = after if spec.chunking == "per_chunk" else state
    return np.concatenate(outputs)


def _read_outputs(artifact: Artifact, media: Media, replies: Sequence[bytes]) -> Floats:
    """The outputs of a stream's replies, float64 [T, O].

    Raises:
        WrongOutputsError: a reply begins elsewhere than where the one before ended.
    """
    read = orjson.loads if media == "json" else ormsgpack.unpackb
    chunks: list[Floats] = []
    for reply in map(read, replies):
        count = sum(map(len, chunks))
        if reply.get("output_position", count if artifact.spec.blocks is None else None) != count:
            raise WrongOutputsError(f"expected outputs from {count} on, got {reply}")
        named = reply["predictions"][0]["outputs"] if "predictions" in reply else reply["outputs"]
        columns = []
        for output in artifact.outputs.outputs:
            values = np.asarray(named[output.name], np.float64)
            columns.append(values.reshape(1 if output.per == "chunk" else len(values), output.size))
        chunks.append(np.concatenate(columns, axis=1))
    return np.concatenate(chunks)
