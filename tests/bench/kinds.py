"""The kinds of networks beside the plain stack: what each is, what it is sent, how it is judged.

Each has two recurrent layers of 64 units and the standard chunks. Where a kind takes whole
sequences these are what `predict` is sent; a model with a decoder is sent forecasts of streams
that had one chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from models.artifact.artifact import Artifact, write_artifact
from models.spec.model import parse_spec
from tests.bench.networks import (
    FEATURES,
    HEADS,
    STEPS,
    UNITS,
    Bodies,
    FloatRows,
    check_answers,
    hold,
)
from tests.bench.traffic import Kept, TrafficSpec
from tests.support.decoder_oracle import oracle_decode
from tests.support.oracle import contracting_weights, oracle_step

HORIZON = 24
PLAIN = "lstm"
"""What the others are held against; its network is the standard one."""

TARGET = "x0"


def _two(**layer: Any) -> dict[str, Any]:
    """Two such layers, the second after the first."""
    return {"layers": [{"units": UNITS, **layer}] * 2}


def _handed(**layer: Any) -> dict[str, Any]:
    """Two such layers, the second starting from what the first returned; chunks are whole."""
    below, above = ({"units": UNITS, **layer, "name": name} for name in ("below", "above"))
    return {"layers": [below, {**above, "starts_from": "below"}], "max_chunk_steps": STEPS}


def _attended(over: str, network: Mapping[str, Any]) -> dict[str, Any]:
    """A network with attention on top."""
    attention = {"kind": "attention", "over": over, "units": UNITS}
    return {**network, "layers": [*network["layers"], attention]}


KINDS: Mapping[str, Mapping[str, Any]] = {
    PLAIN: _two(kind="lstm"),
    "gru": _two(kind="gru"),
    "gru-reset-before": _two(kind="gru", reset_after=False),
    "lstm-peepholes": _two(kind="lstm", peepholes=True),
    "lstm-normalised": _two(kind="lstm", layer_normalization=True),
    "lstm-projected": _two(kind="lstm", projection=32),
    "hand-off": _handed(kind="lstm"),
    "attention-chunk": _attended("chunk", {**_two(kind="lstm"), "max_chunk_steps": STEPS}),
    "attention-stream": _attended("stream", _two(kind="lstm")),
    "bidirectional-blocks": {**_two(kind="bidirectional"), "blocks": {"size": 16, "lookahead": 8}},
    "bidirectional-predict": _attended("chunk", _handed(kind="bidirectional")),
    "forecast": {
        **_two(kind="lstm"),
        "events": {
            "fields": [
                {"kind": "numeric", "name": f"x{n}", "mean": 0.0, "std": 1.0}
                for n in range(FEATURES)
            ]
        },
        "decoder": {
            "targets": [TARGET],
            "layers": [
                {"kind": "lstm", "units": UNITS, "starts_from": f"lstm_{n}"} for n in (1, 2)
            ],
            "max_horizon": HORIZON,
        },
    },
}
"""By name, what the specification says beside the name and the head."""


def write_kinds(folder: Path) -> dict[str, Artifact]:
    """Write every kind as an artifact of its name into one folder."""
    found = {}
    for name, network in KINDS.items():
        features = {} if "events" in network else {"features": FEATURES}
        spec = parse_spec({"name": name, **features, "heads": HEADS, **network})
        found[name] = write_artifact(folder / name, spec, contracting_weights(spec, 1))
    return found


def traffic_of(
    artifact: Artifact, bodies: Bodies, prefix: str, streams: int, sampled: int = 0
) -> TrafficSpec:
    """What a kind is sent: chunks, sequences to predict, or forecasts of streams begun before."""
    model = artifact.spec.name
    if artifact.spec.decoder is not None:
        return TrafficSpec(
            path=f"/v1/models/{model}/streams/%b/forecast".encode(),
            media="json",
            member="horizon",
            values=(b"%d" % HORIZON,),
            steps=(HORIZON,),
            prefix=prefix,
            streams=streams,
            position=STEPS,
            moves=False,
            sampled=sampled,
        )
    if artifact.spec.chunking == "whole":
        return TrafficSpec(
            path=f"/v1/models/{model}/predict".encode(),
            media="json",
            member="sequences",
            values=tuple(b'{"inputs":%b}' % value for value in bodies.values("json")),
            steps=tuple(map(len, bodies.rows)),
            prefix=prefix,
            streams=streams,
            positions=False,
            sampled=sampled,
        )
    return bodies.traffic(prefix, streams, model=model, sampled=sampled)


def judge(artifact: Artifact, spec: TrafficSpec, bodies: Bodies, kept: Sequence[Kept]) -> int:
    """Hold what a kind answered against its definition; a forecast against its stream's one chunk.

    Returns:
        How many events' outputs, or steps ahead, were compared.

    Raises:
        WrongOutputsError
    """
    if artifact.spec.decoder is None:
        return check_answers(artifact, spec, bodies.rows, kept)
    return sum(_check_forecast(artifact, bodies.rows, reply) for reply in kept)


def _check_forecast(artifact: Artifact, rows: Sequence[FloatRows], kept: Kept) -> int:
    spec, weights = artifact.spec, artifact.weights
    zero = artifact.network_state.zero().floats
    _, state = oracle_step(spec, weights, rows[kept.stream % len(rows)], zero)
    point, quantiles = oracle_decode(spec, weights, state, np.zeros((HORIZON, 0), np.float32))
    found = orjson.loads(kept.reply)["forecast"][TARGET]
    what = f"forecast of stream {kept.stream}"
    hold(what, np.asarray(found["point"], np.float64), point[:, 0])
    hold(what, np.asarray(found["quantiles"], np.float64), quantiles[:, 0])
    return HORIZON
