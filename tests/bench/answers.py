"""The check of a server's outputs against the tests' float64 oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
import ormsgpack
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from tests.bench.traffic import Sampled, TrafficSpec
from tests.bench.workloads import HORIZON, TARGET, FloatRows
from tests.support.decoder_oracle import oracle_decode
from tests.support.oracle import oracle_in_blocks, oracle_in_cuts, oracle_step

TOLERANCE = 1e-5
TRAINED_TOLERANCE = 1e-3
"""For weights from training, with heads that exponentiate: the contract's bound is for
contracting networks, and this check is to find wrong answers, not the last digit."""

Floats = NDArray[np.float64]


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
    read, compared = orjson.loads if spec.media == "json" else ormsgpack.unpackb, 0
    for stream in sorted({reply.stream for reply in sampled}):
        own = sorted((r for r in sampled if r.stream == stream), key=lambda r: r.chunk)
        replies = [read(reply.reply) for reply in own]
        if artifact.spec.decoder is not None:
            answers = _forecast_steps(replies)
            expected = np.tile(
                _expected_forecast(artifact, rows[stream % len(rows)]), (len(own), 1)
            )
        else:
            if [reply.chunk for reply in own] != list(range(len(own))):
                raise WrongOutputsError(f"stream {stream}: replies are missing")
            answers = _outputs(artifact, replies)
            sent = [rows[spec.body(stream, reply.chunk)] for reply in own]
            expected = _expected_outputs(artifact, sent)
        if answers.shape != expected.shape:
            raise WrongOutputsError(
                f"stream {stream}: expected outputs {expected.shape}, got {answers.shape}"
            )
        difference = np.abs(answers - expected)
        if not (difference <= tolerance * (1 + np.abs(expected))).all():
            raise WrongOutputsError(
                f"stream {stream}: the outputs differ from the oracle's by up to "
                f"{difference.max():.2g}, expected {tolerance:g}"
            )
        compared += len(answers)
    return compared


def _forecast_steps(replies: Sequence[Mapping[str, Any]]) -> Floats:
    """Point and quantiles at each step ahead of all replies, float64 [replies x H, 1 + Q]."""
    forecasts = [reply["forecast"][TARGET] for reply in replies]
    points = np.array([forecast["point"] for forecast in forecasts], np.float64)[..., None]
    quantiles = np.array([forecast["quantiles"] for forecast in forecasts], np.float64)
    return np.concatenate(np.concatenate([points, quantiles], axis=2))


def _expected_forecast(artifact: Artifact, rows: FloatRows) -> Floats:
    """The same, [H, 1 + Q], after one chunk."""
    spec, weights, zero = artifact.spec, artifact.weights, artifact.network_state.zero().floats
    _, state = oracle_step(spec, weights, rows, zero)
    point, quantiles = oracle_decode(spec, weights, state, np.zeros((HORIZON, 0), np.float32))
    return np.concatenate([point[:, :1], quantiles[:, 0]], axis=1)


def _outputs(artifact: Artifact, replies: Sequence[Mapping[str, Any]]) -> Floats:
    """The outputs of a stream's replies, float64 [T, O].

    Raises:
        WrongOutputsError: a reply begins elsewhere than where the one before ended.
    """
    chunks: list[Floats] = []
    for reply in replies:
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


def _expected_outputs(artifact: Artifact, chunks: Sequence[FloatRows]) -> Floats:
    """The outputs of a new stream for some chunks: all [T, O], or one a chunk [K, O]."""
    spec, weights, zero = artifact.spec, artifact.weights, artifact.network_state.zero().floats
    if spec.blocks is not None:
        rows = np.concatenate(chunks)
        due = max(0, len(rows) - spec.blocks.lookahead) // spec.blocks.size * spec.blocks.size
        return oracle_in_blocks(spec, weights, rows)[:due]
    lengths = [len(rows) for rows in chunks]
    if spec.chunking == "whole":
        whole = np.concatenate([oracle_step(spec, weights, rows, zero)[0] for rows in chunks])
    else:
        whole, _ = oracle_in_cuts(spec, weights, np.concatenate(chunks), zero, lengths)
    # The last columns are the weights of attention, which replies do not show here.
    outputs = whole[:, : sum(output.size for output in artifact.outputs.outputs)]
    is_per_chunk = all(output.per == "chunk" for output in artifact.outputs.outputs)
    return outputs[np.cumsum(lengths) - 1] if is_per_chunk else outputs
