"""Models that see a chunk as a whole, through the API and a real store."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import ormsgpack
import pytest
from pydantic import TypeAdapter

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.model import parse_spec
from service.access.caller import ANYONE
from service.codec.reply_types import ChunkReply
from service.core.errors import ChunkTooLong
from service.core.values import Feed, SequenceInput, Steps
from service.transports.v1 import reply_types
from tests.service.transports.v1.harness import MSGPACK, Harness, harness, problem, rows
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.oracle import contracting_weights, oracle_in_cuts
from tests.support.pipelines import chunk_of, make_artifact
from tests.support.servers import RealServer

LIMIT = 18
"""Longer than the slices of the runtime, shorter than the service's own limit of 20."""
SPEC = parse_spec(
    {
        "name": "whole",
        "features": 3,
        "layers": [
            {"kind": "lstm", "name": "below", "units": 4},
            {"kind": "lstm", "name": "above", "units": 4, "starts_from": "below"},
            {"kind": "attention", "name": "focus", "over": "chunk", "units": 3},
            {"kind": "dense", "name": "tail", "units": 3},
        ],
        "heads": [
            {"kind": "sequence", "name": "each", "input": "above"},
            {"kind": "dense", "name": "once", "units": 2},
        ],
        "max_chunk_steps": LIMIT,
    }
)
PATH = "/v1/models/whole/streams/s/chunks"
MOST = f"at most {LIMIT} steps"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("whole") / "whole"
    return write_artifact(folder, SPEC, contracting_weights(SPEC, 21))


@pytest.fixture
async def api(
    pipeline_server: RealServer, artifact: Artifact, tmp_path: Path
) -> AsyncIterator[Harness]:
    async with harness(
        pipeline_server, {"whole": artifact, "probe": make_artifact(tmp_path)}
    ) as running:
        yield running


def runtime_of(api: Harness) -> NumpyRuntime:
    runtime = api.pipeline.models["whole"].runtime
    assert isinstance(runtime, NumpyRuntime)
    return runtime


def expected(artifact: Artifact, given: np.ndarray, cuts: list[int]) -> list[dict[str, Any]]:
    """Outputs and weights of each chunk, by the oracle from the zero state."""
    size = artifact.state.float_size
    found, _ = oracle_in_cuts(SPEC, artifact.weights, given, np.zeros(size), cuts)
    parts = np.split(found, np.cumsum(cuts)[:-1])
    return [{"each": p[:, :4], "once": p[0, 4:6], "focus": p[:, 6]} for p in parts]


def close(found: Any, wanted: np.ndarray) -> None:
    assert np.shape(found) == wanted.shape
    np.testing.assert_allclose(np.array(found, float), wanted, rtol=1e-5, atol=1e-5)


async def test_each_chunk_is_one_call_whatever_its_length(api: Harness, artifact: Artifact) -> None:
    cuts = [3, LIMIT, 1]
    given, at = rows(sum(cuts)), 0
    for length, wanted in zip(cuts, expected(artifact, given, cuts), strict=True):
        body = {"position": at, "inputs": given[at : at + length].tolist()}
        response = await api.client.post(f"{PATH}?return_attention=true", json=body)
        assert response.status_code == 200, response.text
        TypeAdapter(ChunkReply).validate_json(response.content)
        reply = response.json()
        close(reply["outputs"]["each"], wanted["each"])
        close(reply["outputs"]["once"], wanted["once"])
        close(reply["attention"]["focus"], wanted["focus"])
        assert sum(reply["attention"]["focus"]) == pytest.approx(1, abs=1e-5)
        at += length
    # one call each, three steps of padding in each
    assert [steps for _, steps in runtime_of(api).shapes] == [6, LIMIT + 3, 4]


async def test_the_last_step_alone_and_packed_replies_have_the_same_values(
    api: Harness, artifact: Artifact
) -> None:
    given = rows(5)
    (wanted,) = expected(artifact, given, [5])
    body = {"position": 0, "inputs": given.tolist()}
    plain = (await api.chunk(body, model="whole")).json()
    assert "attention" not in plain
    short = f"{PATH}?return_sequences=false&return_attention=true"
    replayed = (await api.client.post(short, json=body)).json()
    assert replayed["replayed"]
    close(replayed["outputs"]["each"], wanted["each"][-1])
    close(replayed["outputs"]["once"], wanted["once"])
    close(replayed["attention"]["focus"], wanted["focus"])
    packed = await api.client.post(
        f"{PATH}?return_attention=true",
        content=ormsgpack.packb({"position": 0, "inputs": given.tobytes()}),
        headers=MSGPACK,
    )
    found = ormsgpack.unpackb(packed.content)
    assert found["replayed"]
    assert np.shape(found["outputs"]["once"]) == (2,)
    close(found["outputs"]["each"], wanted["each"])
    close(found["attention"]["focus"], wanted["focus"])


async def test_many_streams_and_sequences_share_calls_and_stay_isolated(
    api: Harness, artifact: Artifact
) -> None:
    parts = [rows(length, seed=length) for length in (2, 7, 5)]
    chunks = [
        {"stream": f"m{at}", "position": 0, "inputs": part.tolist()}
        for at, part in enumerate(parts)
    ]
    many = (
        await api.client.post(
            "/v1/models/whole/chunks?return_attention=true", json={"chunks": chunks}
        )
    ).json()
    sequences = [{"inputs": part.tolist()} for part in parts]
    predicted = (
        await api.client.post(
            "/v1/models/whole/predict?return_attention=true", json={"sequences": sequences}
        )
    ).json()
    TypeAdapter(reply_types.PredictReply).validate_python(predicted)
    for part, item, prediction in zip(
        parts, many["results"], predicted["predictions"], strict=True
    ):
        (wanted,) = expected(artifact, part, [len(part)])
        for found in (item["reply"], prediction):
            close(found["outputs"]["each"], wanted["each"])
            close(found["outputs"]["once"], wanted["once"])
            close(found["attention"]["focus"], wanted["focus"])


async def test_longer_chunks_are_rejected_before_any_computation(api: Harness) -> None:
    good, long = rows(LIMIT).tolist(), rows(LIMIT + 1).tolist()
    calls = len(runtime_of(api).shapes)
    document = problem(await api.chunk({"inputs": long}, model="whole"), 413, "chunk_too_long")
    assert (document["expected"], document["got"]) == (LIMIT, LIMIT + 1)
    assert "max_chunk_steps" in document["detail"]
    packed = await api.client.post(
        PATH, content=ormsgpack.packb({"inputs": rows(LIMIT + 1).tobytes()}), headers=MSGPACK
    )
    assert (packed.status_code, ormsgpack.unpackb(packed.content)["code"]) == (
        413,
        "chunk_too_long",
    )
    one = {"sequences": [{"inputs": rows(2).tolist()}, {"inputs": long}]}
    document = problem(
        await api.client.post("/v1/models/whole/predict", json=one), 413, "chunk_too_long"
    )
    assert document["at"] == "sequences[1].inputs"
    assert "max_chunk_steps" in document["detail"]
    assert len(runtime_of(api).shapes) == calls
    assert api.position(model="whole") is None
    items = [{"stream": "s", "inputs": long}, {"stream": "t", "inputs": good}]
    many = (await api.client.post("/v1/models/whole/chunks", json={"chunks": items})).json()
    assert [item["status"] for item in many["results"]] == [413, 200]


async def test_the_pipeline_rejects_longer_chunks_too(api: Harness) -> None:
    for count in (1, 2):
        chunks = [chunk_of(str(n), rows(LIMIT + 1), model="whole") for n in range(count)]
        for result in await api.pipeline.process_many(ANYONE, chunks):
            assert isinstance(result, ChunkTooLong)
            assert f"{MOST}, the max_chunk_steps of model 'whole'" in result.detail
    steps = Steps(Feed.INPUTS, LIMIT + 1, rows=rows(LIMIT + 1))
    with pytest.raises(ChunkTooLong):
        await api.pipeline.predict(ANYONE, "whole", [SequenceInput(steps)])
    (reply,) = await api.pipeline.process_many(ANYONE, [chunk_of("s", rows(LIMIT), model="whole")])
    assert not isinstance(reply, Exception)


async def test_a_retry_keeps_the_cuts(api: Harness) -> None:
    given = rows(6).tolist()
    first = (await api.chunk({"position": 0, "inputs": given}, model="whole")).json()
    again = (await api.chunk({"position": 0, "inputs": given}, model="whole")).json()
    assert again == {**first, "replayed": True}
    for body in (
        {"position": 0, "inputs": given[:4]},
        {"position": 4, "inputs": given[4:]},
        {"position": 0, "inputs": [*given, given[0]]},
    ):
        document = problem(await api.chunk(body, model="whole"), 409, "position_behind")
        assert (document["expected"], document["tag"]) == (6, first["tag"])
    assert api.position(model="whole") == 6


async def test_the_model_detail_describes_its_chunks(api: Harness) -> None:
    response = await api.client.get("/v1/models/whole")
    TypeAdapter(reply_types.ModelDetail).validate_json(response.content)
    model = response.json()
    assert (model["chunking"], model["max_chunk_steps"]) == ("per_chunk", LIMIT)
    assert model["limits"]["max_chunk_steps"] == LIMIT
    assert {name: output["per"] for name, output in model["outputs"].items()} == {
        "each": "step",
        "once": "chunk",
    }
    assert model["attention"] == ["focus"]
    assert list(model["state"]) == ["below.hidden", "below.carry"]
    probe = (await api.client.get("/v1/models/probe")).json()
    assert (probe["max_chunk_steps"], probe["attention"]) == (None, [])
    schema = (await api.client.get("/openapi.json")).json()["components"]["schemas"]
    inputs = json.dumps(schema["whole-Chunk"]["properties"]["inputs"])
    assert f'"maxItems": {LIMIT}' in inputs


async def test_attention_of_a_model_without_attention_is_rejected(api: Harness) -> None:
    given = {"inputs": rows(2).tolist()}
    for path in ("streams/s/chunks", "chunks", "predict"):
        response = await api.client.post(
            f"/v1/models/probe/{path}?return_attention=true", json=given
        )
        assert problem(response, 422, "invalid_input")["at"] == "?return_attention"
    fine = await api.client.post(
        "/v1/models/probe/streams/s/chunks?return_attention=false", json=given
    )
    assert fine.status_code == 200
