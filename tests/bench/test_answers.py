"""What each kind of network is sent, and that wrong answers of each are noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from models.artifact.artifact import Artifact
from tests.bench.answers import Floats, WrongOutputsError, check_answers
from tests.bench.traffic import Sampled, Traffic, WrongReplyError
from tests.bench.workloads import (
    HORIZON,
    KINDS,
    TARGET,
    Bodies,
    FloatRows,
    make_traffic,
    write_network,
)
from tests.support.decoder_oracle import oracle_decode
from tests.support.oracle import oracle_in_blocks, oracle_in_cuts, oracle_step

BODIES = Bodies.random(16)
CHUNKS = 3
SENT = list(BODIES.rows[:CHUNKS])
"""What stream 0 is sent."""

WHOLE = np.concatenate(SENT)


Replies = list[dict[str, Any]]


def check(artifact: Artifact, replies: Replies, first: int = 0) -> int:
    """Check replies to the chunks of stream 0 from the first one on."""
    spec = make_traffic(artifact, BODIES, "checked", 2, sampled=1)
    sampled = [Sampled(0, n, orjson.dumps(reply)) for n, reply in enumerate(replies, first)]
    return check_answers(artifact, spec, BODIES.rows, sampled)


def replies_of(outputs: Sequence[Floats]) -> Replies:
    return [{"outputs": {"out": rows.tolist()}} for rows in outputs]


def oracle_outputs(artifact: Artifact, *chunks: FloatRows) -> list[Floats]:
    """What a new stream gets for each chunk, where the cuts count."""
    zero, lengths = artifact.network_state.zero().floats, [len(rows) for rows in chunks]
    rows = np.concatenate(chunks)
    outputs, _ = oracle_in_cuts(artifact.spec, artifact.weights, rows, zero, lengths)
    return np.split(outputs[:, :8], len(chunks))


def in_one_run(artifact: Artifact) -> Replies:
    return replies_of(np.split(oracle_outputs(artifact, WHOLE)[0], CHUNKS))


def in_cuts(artifact: Artifact) -> Replies:
    return replies_of(oracle_outputs(artifact, *SENT))


def alone(artifact: Artifact) -> Replies:
    return replies_of([oracle_outputs(artifact, rows)[0] for rows in SENT])


def last_values(artifact: Artifact) -> Replies:
    return replies_of([rows[-1] for rows in oracle_outputs(artifact, *SENT)])


def predictions(artifact: Artifact) -> Replies:
    values = [oracle_outputs(artifact, rows)[0][-1] for rows in SENT]
    return [{"predictions": [reply]} for reply in replies_of(values)]


@pytest.mark.parametrize(
    ("name", "right", "wrong", "compared"),
    [
        *((name, in_one_run, alone, 48) for name in KINDS if name.startswith(("lstm", "gru"))),
        ("hand-off", in_cuts, in_one_run, 48),
        ("attention-chunk", last_values, lambda a: last_values(a)[::-1], CHUNKS),
        ("bidirectional-predict", predictions, lambda a: predictions(a)[::-1], CHUNKS),
    ],
)
def test_outputs_are_compared_by_the_models_own_definition(
    name: str,
    right: Callable[[Artifact], Replies],
    wrong: Callable[[Artifact], Replies],
    compared: int,
    tmp_path: Path,
) -> None:
    artifact = write_network(tmp_path, name, KINDS[name])
    assert check(artifact, right(artifact)) == compared
    with pytest.raises(WrongOutputsError, match="differ"):
        check(artifact, wrong(artifact))
    with pytest.raises(WrongOutputsError, match="missing"):
        check(artifact, right(artifact)[1:], first=1)


def test_blocks_are_compared_with_the_oracle_in_blocks(tmp_path: Path) -> None:
    artifact = write_network(tmp_path, "blocks", KINDS["bidirectional-blocks"])
    outputs = oracle_in_blocks(artifact.spec, artifact.weights, WHOLE)
    due = [outputs[:0], outputs[:16], outputs[16:32]]

    def at(rows: list[Floats], *positions: int) -> Replies:
        blocks = zip(replies_of(rows), positions, strict=True)
        return [{**reply, "output_position": position} for reply, position in blocks]

    assert check(artifact, at(due, 0, 0, 16)) == 32
    for wrong, match in (
        (at(due, 0, 0, 0), "from 16 on"),
        (replies_of(due), "from 0 on"),
        (at([*due[:2], due[0]], 0, 0, 16), r"\(32, 8\), got \(16, 8\)"),
        (at([*due[:2], outputs[15:31]], 0, 0, 16), "differ"),
    ):
        with pytest.raises(WrongOutputsError, match=match):
            check(artifact, wrong)


def test_sequences_to_predict_are_whole_bodies(tmp_path: Path) -> None:
    artifact = write_network(tmp_path, "whole", KINDS["bidirectional-predict"])
    request, _ = Traffic(make_traffic(artifact, BODIES, "checked", 2, sampled=2)).request()
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/models/whole/predict HTTP/1.1\r\n")
    assert b"Content-Length: %d" % len(body) in head
    assert orjson.loads(body).keys() == {"sequences"}
    [sequence] = orjson.loads(body)["sequences"]
    np.testing.assert_array_equal(np.float32(sequence["inputs"]), BODIES.rows[0], strict=True)


def test_forecasts_look_ahead_from_an_unchanged_state(tmp_path: Path) -> None:
    artifact = write_network(tmp_path, "forecast", KINDS["forecast"])
    traffic = Traffic(make_traffic(artifact, BODIES, "checked", 1, sampled=1))
    for _ in range(2):
        request, ticket = traffic.request()
        assert request.startswith(b"POST /v1/models/forecast/streams/checked-0000000/forecast ")
        assert request.endswith(b'\r\n\r\n{"position":16,"horizon":24}')
        traffic.accept(ticket, b'{"position":16}')
    assert traffic.events == 2 * HORIZON
    _, ticket = traffic.request()
    with pytest.raises(WrongReplyError, match=r"expected positions \[16\]"):
        traffic.accept(ticket, b'{"position":32}')

    def forecast_after(rows: FloatRows) -> dict[str, list[Any]]:
        zero = artifact.network_state.zero().floats
        _, state = oracle_step(artifact.spec, artifact.weights, rows, zero)
        known = np.zeros((HORIZON, 0), np.float32)
        point, quantiles = oracle_decode(artifact.spec, artifact.weights, state, known)
        return {"point": point[:, 0].tolist(), "quantiles": quantiles[:, 0].tolist()}

    right, moved = forecast_after(SENT[0]), forecast_after(WHOLE[:32])
    assert check(artifact, [{"forecast": {TARGET: right}}] * 2) == 2 * HORIZON
    for part in right:
        with pytest.raises(WrongOutputsError, match="differ"):
            check(artifact, [{"forecast": {TARGET: {**right, part: moved[part]}}}])
