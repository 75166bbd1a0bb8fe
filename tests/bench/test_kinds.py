"""The kinds of networks: what they are sent, and that wrong answers of each are noticed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import orjson
import pytest

from models.artifact.artifact import Artifact
from tests.bench.kinds import HORIZON, KINDS, TARGET, judge, traffic_of, write_kinds
from tests.bench.networks import Bodies, FloatRows, WrongOutputsError
from tests.bench.traffic import Kept, Traffic, WrongReplyError
from tests.support.decoder_oracle import oracle_decode
from tests.support.oracle import Floats, oracle_in_blocks, oracle_in_cuts, oracle_step

BODIES = Bodies.random(16)
CHUNKS = 3
SENT = list(BODIES.rows[:CHUNKS])
"""What stream 0 is sent."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return write_kinds(tmp_path_factory.mktemp("kinds"))


def kept(outputs: list[Floats], *positions: int) -> list[Kept]:
    """Replies of stream 0 with these outputs, in blocks with the positions of their first."""
    found = []
    for chunk, rows in enumerate(outputs):
        reply: dict[str, object] = {"outputs": {"out": rows.tolist()}}
        if positions:
            reply["output_position"] = positions[chunk]
        found.append(Kept(0, chunk, orjson.dumps(reply)))
    return found


def verdict(artifact: Artifact, replies: list[Kept]) -> int:
    spec = traffic_of(artifact, BODIES, "judged", 2, sampled=1)
    return judge(artifact, spec, BODIES, replies)


def whole(artifact: Artifact, rows: FloatRows) -> Floats:
    zero = artifact.network_state.zero().floats
    return oracle_step(artifact.spec, artifact.weights, rows, zero)[0][:, :8]


@pytest.mark.parametrize("name", [n for n in KINDS if n.startswith(("lstm", "gru"))])
def test_a_carried_stack_is_held_against_one_whole_run(
    name: str, kinds: dict[str, Artifact]
) -> None:
    outputs = np.split(whole(kinds[name], np.concatenate(SENT)), CHUNKS)
    assert verdict(kinds[name], kept(outputs)) == 16 * CHUNKS
    anew = [whole(kinds[name], rows) for rows in SENT]
    with pytest.raises(WrongOutputsError, match="differ"):
        verdict(kinds[name], kept(anew))


def test_a_handed_stack_is_held_against_its_own_cuts(kinds: dict[str, Artifact]) -> None:
    artifact = kinds["hand-off"]
    zero = artifact.network_state.zero().floats
    rows = np.concatenate(SENT)
    outputs, _ = oracle_in_cuts(artifact.spec, artifact.weights, rows, zero, [16] * CHUNKS)
    assert verdict(artifact, kept(np.split(outputs, CHUNKS))) == 16 * CHUNKS
    with pytest.raises(WrongOutputsError, match="differ"):
        verdict(artifact, kept(np.split(whole(artifact, rows), CHUNKS)))


def test_attention_over_the_chunk_is_one_value_a_chunk(kinds: dict[str, Artifact]) -> None:
    artifact = kinds["attention-chunk"]
    zero = artifact.network_state.zero().floats
    cuts = [16] * CHUNKS
    outputs, _ = oracle_in_cuts(artifact.spec, artifact.weights, np.concatenate(SENT), zero, cuts)
    values = list(outputs[15::16, :8])
    assert verdict(artifact, kept(values)) == CHUNKS
    with pytest.raises(WrongOutputsError, match="differ"):
        verdict(artifact, kept(values[::-1]))


def test_blocks_are_held_against_their_own_grid(kinds: dict[str, Artifact]) -> None:
    artifact = kinds["bidirectional-blocks"]
    outputs = oracle_in_blocks(artifact.spec, artifact.weights, np.concatenate(SENT))
    due = [outputs[:0], outputs[:16], outputs[16:32]]
    assert verdict(artifact, kept(due, 0, 0, 16)) == 32
    with pytest.raises(WrongOutputsError, match="from 16 on"):
        verdict(artifact, kept(due, 0, 0, 0))
    with pytest.raises(WrongOutputsError, match="from 0 on"):
        verdict(artifact, kept(due))
    with pytest.raises(WrongOutputsError, match=r"\(32, 8\), got \(16, 8\)"):
        verdict(artifact, kept([*due[:2], due[0]], 0, 0, 16))
    moved = oracle_in_blocks(artifact.spec, artifact.weights, np.concatenate(SENT)[:31])
    with pytest.raises(WrongOutputsError, match="differ"):
        verdict(artifact, kept([outputs[:0], moved[:16], moved[15:31]], 0, 0, 16))


def test_predictions_are_of_each_sequence_alone(kinds: dict[str, Artifact]) -> None:
    artifact = kinds["bidirectional-predict"]
    spec = traffic_of(artifact, BODIES, "judged", 2)
    request, _ = Traffic(replace(spec, sampled=2)).request()
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/models/bidirectional-predict/predict HTTP/1.1\r\n")
    assert b"Content-Length: %d" % len(body) in head
    [sequence] = json.loads(body)["sequences"]
    np.testing.assert_array_equal(np.float32(sequence["inputs"]), BODIES.rows[0], strict=True)
    values = [whole(artifact, rows)[-1] for rows in SENT]
    replies = [
        Kept(0, n, orjson.dumps({"predictions": [{"outputs": {"out": value.tolist()}}]}))
        for n, value in enumerate(values)
    ]
    assert verdict(artifact, replies) == CHUNKS
    with pytest.raises(WrongOutputsError, match="differ"):
        verdict(artifact, [replace(replies[0], reply=replies[1].reply), *replies[1:]])


def test_forecasts_look_ahead_from_a_state_that_stays(kinds: dict[str, Artifact]) -> None:
    artifact = kinds["forecast"]
    traffic = Traffic(traffic_of(artifact, BODIES, "judged", 1, sampled=1))
    for _ in range(2):
        request, ticket = traffic.request()
        assert request.startswith(b"POST /v1/models/forecast/streams/judged-0000000/forecast ")
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

    def answered(found: dict[str, Floats]) -> list[Kept]:
        values = {name: numbers.tolist() for name, numbers in found.items()}
        return [Kept(0, 0, orjson.dumps({"forecast": {TARGET: values}}))]

    right, moved = forecast_after(SENT[0]), forecast_after(np.concatenate(SENT[:2]))
    assert verdict(artifact, answered(right)) == HORIZON
    for part in right:
        with pytest.raises(WrongOutputsError, match="forecast of stream 0"):
            verdict(artifact, answered({**right, part: moved[part]}))
