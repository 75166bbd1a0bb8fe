"""Predictions that continue a state which the client holds, signed by the service."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ormsgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.model import parse_spec
from service.access.caller import ANYONE
from service.core.errors import StateTokenInvalid, StoreUnavailable
from service.core.values import Feed, SequenceInput, Steps
from service.pipeline.pipeline import Pipeline
from service.pipeline.state_tokens import KEY_LIFE_S, StateTokens, state_after
from tests.service.transports.v1.harness import (
    EVENT,
    EVENT_MS,
    MSGPACK,
    Harness,
    harness,
    problem,
    rows,
)
from tests.support.models import SMALL
from tests.support.numpy_runtime import numpy_served
from tests.support.oracle import contracting_weights
from tests.support.pipelines import SPEC, make_artifact, worker
from tests.support.servers import RealServer

ROWS = rows(9)
TOKEN = "?return_state_token=true"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Artifact]:
    """`probe`, another model of the same weights, and one with resets of its own."""
    folder: Path = tmp_path_factory.mktemp("tokens")
    specs = [
        SPEC.model_copy(update={"name": "twin"}),
        parse_spec({**SMALL, "name": "sessions", "session_gap_s": 100, "reset_every": 7}),
        parse_spec(
            {
                "name": "whole",
                "features": 3,
                "layers": [{"kind": "bidirectional", "cell": "gru", "units": 2}],
                "heads": [{"kind": "dense", "name": "out", "units": 1}],
            }
        ),
    ]
    made = [
        write_artifact(folder / spec.name, spec, contracting_weights(spec, 1)) for spec in specs
    ]
    return {artifact.spec.name: artifact for artifact in [make_artifact(folder), *made]}


async def predict(
    api: Harness, sequence: dict[str, Any], model: str = "probe", query: str = TOKEN
) -> Any:
    url = f"/v1/models/{model}/predict{query}"
    return await api.client.post(url, json={"sequences": [sequence]})


async def token_of(api: Harness, sequence: dict[str, Any], model: str = "probe") -> str:
    response = await predict(api, sequence, model)
    assert response.status_code == 200, response.text
    token: str = response.json()["predictions"][0]["state_token"]
    return token


@pytest.mark.parametrize("model", ["probe", "sessions"])
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cuts=st.lists(st.integers(1, 8), unique=True, max_size=4).map(sorted),
    gaps_s=st.lists(st.sampled_from([1, 101, -5]), min_size=9, max_size=9),
    resets=st.lists(st.integers(0, 8), unique=True, max_size=2).map(sorted),
)
async def test_a_sequence_in_parts_is_the_whole_sequence(
    api: Harness, model: str, cuts: list[int], gaps_s: list[int], resets: list[int]
) -> None:
    times_ms = EVENT_MS + 1000 * np.cumsum(gaps_s)
    events = [{**EVENT, "load": at, "at": int(ms)} for at, ms in enumerate(times_ms)]
    name, values = ("inputs", ROWS.tolist()) if model == "probe" else ("events", events)
    whole = (await predict(api, {name: values, "resets": resets}, model, "")).json()
    expected = whole["predictions"][0]["outputs"]
    token, found = None, []
    for start, stop in zip([0, *cuts], [*cuts, 9], strict=True):
        own = [at - start for at in resets if start <= at < stop]
        sequence = {name: values[start:stop], "resets": own}
        if token is not None:
            sequence["state_token"] = token
        (part,) = (await predict(api, sequence, model)).json()["predictions"]
        token = part["state_token"]
        found.append(part["outputs"])
    for output, numbers in expected.items():
        joined = np.concatenate([part[output] for part in found])
        np.testing.assert_allclose(joined, numbers, rtol=1e-5, atol=1e-6)
    assert not list(api.store.states)


async def test_json_and_messagepack_carry_the_same_token(api: Harness) -> None:
    text = await token_of(api, {"inputs": ROWS[:4].tolist()})
    body = ormsgpack.packb({"sequences": [{"inputs": ROWS[:4].tobytes()}]})
    url = f"/v1/models/probe/predict{TOKEN}"
    packed = ormsgpack.unpackb((await api.client.post(url, content=body, headers=MSGPACK)).content)
    token = packed["predictions"][0]["state_token"]
    assert token == b64decode(text)
    body = ormsgpack.packb({"sequences": [{"inputs": ROWS[4:].tobytes(), "state_token": token}]})
    packed = ormsgpack.unpackb((await api.client.post(url, content=body, headers=MSGPACK)).content)
    plain = await predict(api, {"inputs": ROWS[4:].tolist(), "state_token": text})
    (found,), (expected,) = packed["predictions"], plain.json()["predictions"]
    assert b64encode(found["state_token"]).decode() == expected["state_token"]
    np.testing.assert_array_equal(found["outputs"]["out"], np.float32(expected["outputs"]["out"]))


async def test_a_changed_token_is_rejected(api: Harness) -> None:
    token = b64decode(await token_of(api, {"inputs": ROWS[:4].tolist()}))
    more = {"inputs": ROWS[4:].tolist()}
    changed = [token[:at] + bytes((token[at] ^ 1,)) + token[at + 1 :] for at in range(len(token))]
    for wrong in [
        *changed[::7],
        changed[4],
        changed[5],
        token[:-1],
        token + b"\0",
        token[:20],
        b"",
    ]:
        sequence = {**more, "state_token": b64encode(wrong).decode()}
        document = problem(await predict(api, sequence), 422, "state_token_invalid")
        assert document["at"] == "sequences[0].state_token"
    assert (
        "format 0"
        in problem(
            await predict(api, {**more, "state_token": b64encode(changed[4]).decode()}),
            422,
            "state_token_invalid",
        )["detail"]
    )
    for wrong in ("no base64!", 7, ["a"]):
        document = problem(await predict(api, {**more, "state_token": wrong}), 422, "invalid_input")
        assert document["at"] == "sequences[0].state_token"


async def test_a_token_is_bound_to_model_version_and_kind_of_input(
    api: Harness, pipeline_server: RealServer, models: Mapping[str, Artifact], tmp_path: Path
) -> None:
    more = {"inputs": ROWS[4:].tolist()}
    token = await token_of(api, {"inputs": ROWS[:4].tolist()})
    twin = await predict(api, {**more, "state_token": token}, "twin")
    assert models["twin"].fingerprint == models["probe"].fingerprint
    document = problem(twin, 422, "state_token_of_other_model")
    assert (document["expected"], document["got"]) == ("twin", "probe")
    events = await token_of(api, {"events": [EVENT]}, "sessions")
    wide = {"inputs": rows(2, features=models["sessions"].spec.input_features).tolist()}
    wide["inputs"] = np.zeros_like(wide["inputs"]).tolist()
    kind = await predict(api, {**wide, "state_token": events}, "sessions")
    assert problem(kind, 409, "input_kind_mismatch")["expected"] == "events"
    whole = await predict(api, {"inputs": ROWS.tolist()}, "whole")
    assert problem(whole, 422, "invalid_input")["at"] == "?return_state_token"
    whole = await predict(api, {"inputs": ROWS.tolist(), "state_token": token}, "whole", "")
    assert problem(whole, 422, "invalid_input")["at"] == "sequences[0].state_token"
    chunk = await api.chunk({"inputs": ROWS.tolist(), "state_token": token})
    assert problem(chunk, 422, "invalid_input")["at"] == "state_token"

    with pipeline_server.client() as client:
        key = client.get("carry:token-key")
    retrained = make_artifact(tmp_path, seed=2)
    async with harness(pipeline_server, {"probe": retrained}) as other:
        with pipeline_server.client() as client:
            client.set("carry:token-key", key)
        response = await predict(other, {**more, "state_token": token})
        document = problem(response, 422, "state_token_of_other_version")
        assert document["expected"] == retrained.fingerprint.hex()


async def test_workers_share_the_key_and_detect_a_new_one(
    store_url: str, pipeline_server: RealServer, artifact: Artifact
) -> None:
    first = SequenceInput(Steps(Feed.INPUTS, 4, rows=ROWS[:4]))
    rest = Steps(Feed.INPUTS, 5, rows=ROWS[4:])

    async def token(pipeline: Pipeline) -> bytes:
        (found,) = await pipeline.predict(ANYONE, "probe", [first], return_tokens=True)
        assert found.token is not None
        return found.token

    async with worker(store_url, artifact) as one, worker(store_url, artifact) as two:
        held = await token(one)
        assert held == await token(two)
        (found,) = await two.predict(ANYONE, "probe", [SequenceInput(rest, held)])
        (whole,) = await one.predict(
            ANYONE, "probe", [SequenceInput(Steps(Feed.INPUTS, 9, rows=ROWS))]
        )
        np.testing.assert_allclose(found.outputs, whole.outputs[4:], rtol=1e-5, atol=1e-6)
        with pipeline_server.client() as client:
            client.flushall()
        async with worker(store_url, artifact) as three:
            # it draws a key; the others read it once they meet a token that theirs did not sign
            other = await token(three)
            await two.predict(ANYONE, "probe", [SequenceInput(rest, other)])
            with pytest.raises(StateTokenInvalid):
                await three.predict(ANYONE, "probe", [SequenceInput(rest, held)])


async def test_a_key_is_kept_while_the_store_does_not_answer(artifact: Artifact) -> None:
    served = numpy_served(artifact)
    now_s, keys = [0.0], iter([b"a" * 32, None, b"b" * 32])
    reads: list[bytes | None] = []

    async def read() -> bytes:
        reads.append(next(keys))
        if reads[-1] is None:
            raise StoreUnavailable("the store does not answer")
        return reads[-1]

    tokens = StateTokens(read, lambda: now_s[0])
    pipeline_state = _state(artifact)
    first = await tokens.sign(served, pipeline_state)
    now_s[0] = KEY_LIFE_S - 1
    assert await tokens.sign(served, pipeline_state) == first
    now_s[0] = KEY_LIFE_S + 1
    assert await tokens.sign(served, pipeline_state) == first
    assert await tokens.sign(served, pipeline_state) != first
    assert reads == [b"a" * 32, None, b"b" * 32]


def _state(artifact: Artifact) -> Any:
    steps = Steps(Feed.INPUTS, 4, rows=ROWS[:4])
    return state_after(numpy_served(artifact), steps, None, artifact.state.zero())
