"""What each kind of network is sent, and that wrong answers of each are noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import orjson
import pytest

from models.artifact.artifact import Artifact
from tests.bench.traffic import Sampled, Traffic, WrongReplyError
from tests.bench.workloads import (
    HORIZON,
    KINDS,
    TARGET,
    Bodies,
    FloatRows,
    Floats,
    WrongOutputsError,
    check_answers,
    traffic_of,
    write_network,
)
from tests.support.decoder_oracle import oracle_decode
from tests.support.oracle import oracle_in_blocks, oracle_in_cuts, oracle_step

BODIES = Bodies.random(16)
CHUNKS = 3
SENT = list(BODIES.rows[:CHUNKS])
"""What stream 0 is sent."""


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    folder = tmp_path_factory.mktemp("kinds")
    artifacts: dict[str, Artifact] = {}

    def load(name: str) -> Artifact:
        if name not in artifacts:
            artifacts[name] = write_network(folder, name, KINDS[name])
        return artifacts[name]

    return load


def check(artifact: Artifact, replies: list[Sampled]) -> int:
    spec = traffic_of(artifact, BODIES, "checked", 2, sampled=1)
    return check_answers(artifact, spec, BODIES.rows, replies)


def sample(outputs: list[Floats], *positions: int) -> list[Sampled]:
    """Replies of stream 0 with these outputs, in blocks with the positions of their first."""
    replies = []
    for chunk, rows in enumerate(outputs):
        reply: dict[str, object] = {"outputs": {"out": rows.tolist()}}
        if positions:
            reply["output_position"] = positions[chunk]
        replies.append(Sampled(0, chunk, orjson.dumps(reply)))
    return replies


def oracle_outputs(artifact: Artifact, rows: FloatRows) -> Floats:
    zero = artifact.network_state.zero().floats
    return oracle_step(artifact.spec, artifact.weights, rows, zero)[0][:, :8]


def in_cuts(artifact: Artifact) -> Floats:
    zero, rows = artifact.network_state.zero().floats, np.concatenate(SENT)
    return oracle_in_cuts(artifact.spec, artifact.weights, rows, zero, [16] * CHUNKS)[0]


@pytest.mark.parametrize("name", [n for n in KINDS if n.startswith(("lstm", "gru"))])
def test_stacked_layers_are_compared_with_one_run(
    name: str, load: Callable[[str], Artifact]
) -> None:
    artifact = load(name)
    outputs = np.split(oracle_outputs(artifact, np.concatenate(SENT)), CHUNKS)
    assert check(artifact, sample(outputs)) == 16 * CHUNKS
    with pytest.raises(WrongOutputsError, match="differ"):
        check(artifact, sample([oracle_outputs(artifact, rows) for rows in SENT]))
    with pytest.raises(WrongOutputsError, match="missing"):
        check(artifact, sample(outputs)[1:])


def test_passed_on_states_are_compared_chunk_by_chunk(load: Callable[[str], Artifact]) -> None:
    artifact = load("hand-off")
    assert check(artifact, sample(np.split(in_cuts(artifact), CHUNKS))) == 16 * CHUNKS
    with pytest.raises(WrongOutputsError, match="differ"):
        check(artifact, sample(np.split(oracle_outputs(artifact, np.concatenate(SENT)), CHUNKS)))


def test_attention_over_the_chunk_is_one_value_a_chunk(load: Callable[[str], Artifact]) -> None:
    values = list(in_cuts(load("attention-chunk"))[15::16, :8])
    assert check(load("attention-chunk"), sample(values)) == CHUNKS
    with pytest.raises(WrongOutputsError, match="differ"):
        check(load("attention-chunk"), sample(values[::-1]))


def test_blocks_are_compared_with_the_oracle_in_blocks(load: Callable[[str], Artifact]) -> None:
    artifact = load("bidirectional-blocks")
    outputs = oracle_in_blocks(artifact.spec, artifact.weights, np.concatenate(SENT))
    due = [outputs[:0], outputs[:16], outputs[16:32]]
    assert check(artifact, sample(due, 0, 0, 16)) == 32
    for wrong, positions, match in (
        (due, (0, 0, 0), "from 16 on"),
        (due, (), "from 0 on"),
        ([*due[:2], due[0]], (0, 0, 16), r"\(32, 8\), got \(16, 8\)"),
        ([due[0], due[1], outputs[15:31]], (0, 0, 16), "differ"),
    ):
        with pytest.raises(WrongOutputsError, match=match):
            check(artifact, sample(wrong, *positions))


def test_predictions_are_of_each_sequence_alone(load: Callable[[str], Artifact]) -> None:
    artifact = load("bidirectional-predict")
    request, _ = Traffic(traffic_of(artifact, BODIES, "checked", 2, sampled=2)).request()
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/models/bidirectional-predict/predict HTTP/1.1\r\n")
    assert b"Content-Length: %d" % len(body) in head
    [sequence] = json.loads(body)["sequences"]
    np.testing.assert_array_equal(np.float32(sequence["inputs"]), BODIES.rows[0], strict=True)
    replies = [
        Sampled(0, n, orjson.dumps({"predictions": [{"outputs": {"out": value.tolist()}}]}))
        for n, value in enumerate(oracle_outputs(artifact, rows)[-1] for rows in SENT)
    ]
    assert check(artifact, replies) == CHUNKS
    with pytest.raises(WrongOutputsError, match="differ"):
        check(artifact, [replace(replies[0], reply=replies[1].reply), *replies[1:]])


def test_forecasts_look_ahead_from_an_unchanged_state(load: Callable[[str], Artifact]) -> None:
    artifact = load("forecast")
    traffic = Traffic(traffic_of(artifact, BODIES, "checked", 1, sampled=1))
    for _ in range(2):
        request, ticket = traffic.request()
        assert request.startswith(b"POST /v1/models/forecast/streams/checked-0000000/forecast ")
        assert json.loads(request.partition(b"\r\n\r\n")[2]) == {"position": 16, "horizon": 24}
        traffic.accept(ticket, b'{"position":16}', 0)
    assert traffic.events == 2 * HORIZON
    _, ticket = traffic.request()
    with pytest.raises(WrongReplyError, match="expected position 16"):
        traffic.accept(ticket, b'{"position":32}', 0)

    def forecast_after(rows: FloatRows) -> dict[str, Floats]:
        zero = artifact.network_state.zero().floats
        _, state = oracle_step(artifact.spec, artifact.weights, rows, zero)
        known = np.zeros((HORIZON, 0), np.float32)
        point, quantiles = oracle_decode(artifact.spec, artifact.weights, state, known)
        return {"point": point[:, 0], "quantiles": quantiles[:, 0]}

    def answer(forecast: dict[str, Floats]) -> list[Sampled]:
        values = {name: numbers.tolist() for name, numbers in forecast.items()}
        return [Sampled(0, 0, orjson.dumps({"forecast": {TARGET: values}}))]

    right, moved = forecast_after(SENT[0]), forecast_after(np.concatenate(SENT[:2]))
    assert check(artifact, answer(right)) == HORIZON
    for part in right:
        with pytest.raises(WrongOutputsError, match="forecast of stream 0"):
            check(artifact, answer({**right, part: moved[part]}))
