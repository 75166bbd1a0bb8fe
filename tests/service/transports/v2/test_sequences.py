"""Ends of sequences, long requests, and models with blocks, of whole sequences or per chunk."""

from __future__ import annotations

import asyncio
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.model import ModelSpec
from service.access.caller import ANYONE, Verb
from service.core.errors import StoreUnavailable
from service.core.values import Reply
from service.transports.v2.http_routes import add_kserve
from service.transports.v2.inference import Inference
from service.transports.v2.replies import OutputTensor
from tests.service.transports.v1 import test_blocks, test_per_chunk, test_whole
from tests.service.transports.v1.harness import harness, rows
from tests.service.transports.v2.conftest import add_v2
from tests.service.transports.v2.v2 import (
    V2,
    V2Reply,
    binary_body,
    error_of,
    json_body,
    reply_of,
)
from tests.support.oracle import contracting_weights, oracle_in_blocks
from tests.support.pipelines import SPEC, chunk_of, oracle_outputs
from tests.support.servers import RealServer

ROWS = rows(4)


def add_deleting(app: FastAPI) -> None:
    """Add the V2 routes, as with CARRY_SEQUENCE_END=delete."""
    add_kserve(app, Inference(app.state.api, delete_at_end=True), dict)


def artifact_of(spec: ModelSpec, folder: Path) -> Artifact:
    return write_artifact(folder / spec.name, spec, contracting_weights(spec, 2))


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
async def test_end_deletes_the_stream_if_the_setting_says_so(
    pipeline_server: RealServer, models: dict[str, Artifact], binary: bool
) -> None:
    async with harness(pipeline_server, models, extend=add_deleting) as api:
        v2 = V2(api)
        first = await v2.infer(ROWS, binary=binary, sequence_id=5, position=0)
        assert "deleted" not in first.parameters
        assert api.position("5") == 4
        last = await v2.infer(ROWS, binary=binary, sequence_id=5, position=4, sequence_end=True)
        assert last.parameters["deleted"]
        assert last.parameters["position"] == 8
        assert api.position("5") is None
        both = {"sequence_id": 6, "sequence_start": True, "sequence_end": True}
        for _ in range(2):
            alone = await v2.infer(ROWS, binary=binary, position=0, **both)
            assert alone.parameters["deleted"]
            np.testing.assert_array_equal(alone.outputs["last"], first.outputs["last"])


async def test_outputs_are_returned_if_the_stream_cannot_be_deleted(
    pipeline_server: RealServer, models: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness(pipeline_server, models, extend=add_deleting) as api:

        async def fail(*arguments: object) -> None:
            raise StoreUnavailable("the store does not answer")

        monkeypatch.setattr(api.pipeline.streams, "delete", fail)
        reply = await V2(api).infer(ROWS, sequence_id=5, sequence_end=True)
        assert "deleted" not in reply.parameters
        assert api.position("5") == 4


async def test_end_leaves_a_stream_that_others_continued(
    pipeline_server: RealServer, models: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness(pipeline_server, models, extend=add_deleting) as api:
        process = api.pipeline.process

        async def process_and_be_overtaken(*arguments: Any) -> Reply:
            reply = await process(*arguments)
            await process(ANYONE, chunk_of("5", ROWS))
            return reply

        monkeypatch.setattr(api.pipeline, "process", process_and_be_overtaken)
        reply = await V2(api).infer(ROWS, sequence_id=5, sequence_end=True)
        assert "deleted" not in reply.parameters
        assert api.position("5") == 8


async def test_end_that_deletes_needs_the_verb_of_deletions(
    pipeline_server: RealServer, models: dict[str, Artifact]
) -> None:
    """Before the chunk is applied, on both paths; without the end the chunk is."""
    deleting = harness(pipeline_server, models, requires_keys=True, extend=add_deleting)
    async with deleting as api:
        headers = {"authorization": await api.key(verbs=(Verb.PREDICT,))}
        for expected in (403, 403, 200):
            parameters: dict[str, Any] = {"sequence_id": 5, "sequence_end": expected == 403}
            body, lengths = binary_body(ROWS, {**parameters, "binary_data_output": True})
            response = await V2(api).post(body, headers | lengths)
            assert response.status_code == expected
        assert api.position("5") == len(ROWS)


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
async def test_sequence_ends_racing_with_chunks_neither_lose_nor_duplicate_events(
    pipeline_server: RealServer, models: dict[str, Artifact], binary: bool
) -> None:
    """Each epoch has its chunks once, in some order, and a deletion is its last event."""
    probe, sent = models["probe"], rows(40)
    async with harness(pipeline_server, models, extend=add_deleting) as api:
        v2 = V2(api)

        async def send(client: int) -> list[tuple[int, V2Reply]]:
            replies = []
            for at in range(client, len(sent), 2):
                ends = {"sequence_end": True} if at % 3 == 0 else {}
                reply = await v2.infer(sent[at : at + 1], binary=binary, sequence_id=5, **ends)
                replies.append((at, reply))
            return replies

        replies = [*chain.from_iterable(await asyncio.gather(send(0), send(1)))]
    epochs: dict[str, dict[int, tuple[int, V2Reply]]] = {}
    for at, reply in replies:
        applied = epochs.setdefault(str(reply.parameters["epoch"]), {})
        assert reply.parameters["position"] not in applied
        applied[int(reply.parameters["position"])] = at, reply
    deleted = sum("deleted" in reply.parameters for _, reply in replies)
    assert deleted <= len(epochs) <= deleted + 1
    for applied in epochs.values():
        assert sorted(applied) == list(range(1, len(applied) + 1))
        order = [applied[position] for position in sorted(applied)]
        assert not any("deleted" in reply.parameters for _, reply in order[:-1])
        expected = oracle_outputs(probe, sent[[at for at, _ in order]])
        for name, values in probe.outputs.by_name(expected).items():
            outputs = np.concatenate([reply.outputs[name] for _, reply in order])
            np.testing.assert_allclose(outputs, values, rtol=1e-4, atol=1e-5)


async def test_end_closes_a_stream_of_blocks_and_computes_what_is_pending(
    pipeline_server: RealServer, tmp_path: Path
) -> None:
    """And a start begins again over the closed stream."""
    artifact = artifact_of(test_blocks.TAGGER, tmp_path)
    sent = test_blocks.ROWS
    expected = oracle_in_blocks(test_blocks.TAGGER, artifact.weights, sent)
    async with harness(pipeline_server, {"tagger": artifact}, extend=add_v2) as api:
        v2 = V2(api)
        for _ in range(2):
            outputs: list[np.ndarray] = []
            for first, last in ((0, 5), (5, 6), (6, 14)):
                parameters: dict[str, Any] = {
                    "sequence_id": 4,
                    "sequence_start": first == 0,
                    "sequence_end": last == 14,
                    "binary_data_output": True,
                }
                body, headers = binary_body(sent[first:last], parameters)
                reply = reply_of(await v2.post(body, headers, model="tagger"))
                assert reply.parameters["output_position"] == sum(map(len, outputs))
                outputs.append(np.concatenate([reply.outputs[n] for n in ("label", "last")], 1))
            np.testing.assert_allclose(np.concatenate(outputs), expected, rtol=1e-4, atol=1e-5)
            after = json_body(sent[:1], parameters={"sequence_id": 4})
            error_of(await v2.post(after, model="tagger"), 409, "stream_final")


async def test_model_of_whole_sequences_has_no_sequence_batching(
    pipeline_server: RealServer, tmp_path: Path
) -> None:
    artifact = artifact_of(test_whole.SPEC, tmp_path)
    async with harness(pipeline_server, {"tagger": artifact}, extend=add_v2) as api:
        v2 = V2(api)
        config = (await api.client.get("/v2/models/tagger/config")).json()
        assert "sequence_batching" not in config
        body = json_body(test_blocks.ROWS)
        reply = reply_of(await v2.post(body, model="tagger"))
        predicted = await api.client.post(
            "/v1/models/tagger/predict",
            json={"sequences": [{"inputs": test_blocks.ROWS.tolist()}]},
        )
        label = predicted.json()["predictions"][0]["outputs"]["label"]
        np.testing.assert_array_equal(reply.outputs["label"], np.array(label, np.float32))
        error_of(
            await v2.post({**body, "parameters": {"sequence_id": 1}}, model="tagger"),
            422,
            "chunks_unsupported",
        )


async def test_output_per_chunk_has_no_axis_of_steps(
    pipeline_server: RealServer, tmp_path: Path
) -> None:
    artifact = artifact_of(test_per_chunk.SPEC, tmp_path)
    async with harness(pipeline_server, {"whole": artifact}, extend=add_v2) as api:
        metadata = (await api.client.get("/v2/models/whole")).json()
        assert metadata["outputs"] == [
            {"name": "each", "datatype": "FP32", "shape": [-1, -1, 4]},
            {"name": "once", "datatype": "FP32", "shape": [-1, 2]},
        ]
        body = json_body(ROWS[np.newaxis], parameters={"sequence_id": 1, "position": 0})
        reply = reply_of(await V2(api).post(body, model="whole"))
        chunk = await api.chunk({"inputs": ROWS.tolist()}, stream="2", model="whole")
        for name, shape in (("each", (1, 4, 4)), ("once", (1, 2))):
            values = np.array(chunk.json()["outputs"][name], np.float32)
            assert reply.outputs[name].shape == shape
            np.testing.assert_array_equal(reply.outputs[name][0], values)


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
async def test_attention_and_state_are_outputs_that_a_request_may_select(
    pipeline_server: RealServer, tmp_path: Path, binary: bool
) -> None:
    """In the order of the request, of chunks and of predictions; the last has several sequences."""
    whole = artifact_of(test_per_chunk.SPEC, tmp_path)
    probe = artifact_of(SPEC, tmp_path)
    models = {"whole": whole, "probe": probe}
    async with harness(pipeline_server, models, extend=add_v2) as api:
        v2 = V2(api)

        async def select(
            model: str, sent: NDArray[np.float32], names: list[str], **parameters: Any
        ) -> dict[str, NDArray[Any]]:
            outputs = [{"name": name} for name in names]
            if binary:
                parameters["binary_data_output"] = True
            body, headers = binary_body(sent, parameters, outputs=outputs)
            reply = reply_of(await v2.post(body, headers, model=model))
            assert list(reply.outputs) == names
            return reply.outputs

        address = "/v1/models/whole/streams/2/chunks?return_attention=true"
        chunk = await api.client.post(address, json={"inputs": ROWS.tolist()})
        weights = np.array(chunk.json()["attention"]["focus"], np.float32)
        found = await select("whole", ROWS, ["attention.focus", "each"], sequence_id=1, position=0)
        np.testing.assert_array_equal(found["attention.focus"], weights)
        parts = probe.state.by_name(probe.state.zero())
        names = ["out", *(f"state.{part}" for part in parts)]
        found = await select("probe", ROWS, names, sequence_id=1, position=0)
        stored = (await api.client.get("/v1/models/probe/streams/1/state")).json()["state"]
        both = await select("probe", np.stack([ROWS, ROWS]), names)
        for part in parts:
            np.testing.assert_array_equal(found[f"state.{part}"], np.float32(stored[part]))
            np.testing.assert_allclose(both[f"state.{part}"][1], stored[part], rtol=1e-4, atol=1e-6)
        body = json_body(ROWS, outputs=[{"name": "state.none"}])
        error = error_of(await v2.post(body, model="probe"), 422, "invalid_input")
        assert "expected each once of last, out, steep, state." in error["error"]
    clock = OutputTensor("state.clock", np.array([2**40], ">i8"))
    assert (clock.datatype, clock.data) == ("INT64", (2**40).to_bytes(8, "little"))


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
async def test_long_requests_wait_for_their_turn_with_the_same_results(
    pipeline_server: RealServer,
    models: dict[str, Artifact],
    monkeypatch: pytest.MonkeyPatch,
    binary: bool,
) -> None:
    """Requests of usual length, as if they were long."""
    monkeypatch.setattr("service.transports.common.long_bodies.LONG_BYTES", 100)
    sent = rows(15)
    async with harness(pipeline_server, models, fast_path=False, extend=add_v2) as api:
        v2 = V2(api)
        reply = await v2.infer(sent, binary=binary, sequence_id=1, sequence_start=True, position=0)
        expected = oracle_outputs(models["probe"], sent)
        for name, values in models["probe"].outputs.by_name(expected).items():
            np.testing.assert_allclose(reply.outputs[name], values, rtol=1e-4, atol=1e-5)
        several = await v2.infer(np.stack([sent, sent]), binary=binary)
        np.testing.assert_array_equal(several.outputs["out"][1], reply.outputs["out"])
        sent[12, 1] = np.nan
        body, headers = binary_body(sent, {"sequence_id": 1})
        error = error_of(await v2.post(body, headers), 422, "invalid_input")
        assert "inputs[12][1]" in error["error"]
