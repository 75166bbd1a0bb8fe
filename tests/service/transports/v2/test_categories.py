"""A head with the most probable categories: names in documents and tables, codes in tensors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from pydantic import TypeAdapter

from carry_client.description import read_description
from carry_client.replies import read_reply
from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.model import ModelSpec, parse_spec
from service.access.caller import ANYONE
from service.backfill.run import run_backfill
from service.core.errors import AlreadyApplied, VersionRejected
from service.core.values import StreamKey
from service.pipeline.model_record import check_accepts_same_requests
from service.pipeline.served_model import ServedModel
from service.transports.v1 import reply_types
from tests.service.transports.live.sockets import live_application
from tests.service.transports.live.test_watching import watched
from tests.service.transports.v1.harness import FAST_PATH, harness
from tests.service.transports.v2.conftest import add_v2
from tests.service.transports.v2.v2 import V2, reply_of
from tests.support.backfill import Recording, job_of
from tests.support.models import random_weights
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.oracle import oracle_step
from tests.support.pipelines import chunk_of, worker
from tests.support.servers import RealServer, becomes

NAMES = ["a", "b", "Österreich", "航空"]
LABELS = ["<unknown>", *NAMES]
EVENTS = [{"kind": name} for name in ("b", "航空", "new", "a", "b")]


def next_spec(vocabulary: list[str]) -> ModelSpec:
    field = {"kind": "categorical", "name": "kind", "embedding": 3, "vocabulary": vocabulary}
    time = {"kind": "timestamp", "name": "at", "optional": True, "gap_mean": 0.0, "gap_std": 1.0}
    head = {"kind": "classification", "name": "next", "target": "kind", "top": 3}
    layers = [{"kind": "lstm", "units": 4}]
    events = {"fields": [field, time]}
    return parse_spec({"name": "next", "events": events, "layers": layers, "heads": [head]})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    spec = next_spec(NAMES)
    return write_artifact(tmp_path_factory.mktemp("next") / "next", spec, random_weights(spec))


@pytest.fixture
async def v2(pipeline_server: RealServer, artifact: Artifact) -> AsyncIterator[V2]:
    models: Mapping[str, Artifact] = {"next": artifact}
    async with harness(pipeline_server, models, fast_path=FAST_PATH, extend=add_v2) as api:
        yield V2(api)


async def test_documents_name_categories_and_tensors_have_their_codes(
    v2: V2, artifact: Artifact
) -> None:
    described = (await v2.api.client.get("/v1/models/next")).content
    detail = TypeAdapter(reply_types.ModelDetail).validate_json(described)
    assert detail["outputs"]["next.category"]["categories_of"] == "kind"
    path = "/v1/models/next/streams/s/chunks"
    document = (await v2.api.client.post(path, json={"events": EVENTS})).json()
    event = {"name": "events", "datatype": "BYTES", "shape": [len(EVENTS)]}
    texts = [f'{{"kind": "{each["kind"]}"}}' for each in EVENTS]
    tensors = reply_of(await v2.post({"inputs": [{**event, "data": texts}]}, model="next")).outputs

    codes = tensors["next.category"].astype(int)
    assert document["outputs"]["next.category"] == [[LABELS[code] for code in row] for row in codes]
    model = read_description(detail)
    reply = read_reply(model, document, 0)
    assert reply.to_columns()["next.category[0]"].tolist() == [LABELS[row[0]] for row in codes]
    rows = model.pack(reply.outputs, len(EVENTS))
    packed = [tensors[each.name].reshape(len(EVENTS), -1) for each in model.outputs]
    np.testing.assert_allclose(rows, np.concatenate(packed, axis=1), rtol=1e-5, atol=1e-6)


async def test_surprise_of_a_chunks_first_event_is_that_of_the_state_before(
    v2: V2, artifact: Artifact
) -> None:
    path = "/v1/models/next/streams/s/chunks"
    parts = [
        (await v2.api.client.post(path, json={"events": part})).json()["outputs"]
        for part in (EVENTS[:2], EVENTS[2:3], EVENTS[3:])
    ]
    rows = np.zeros((len(EVENTS), artifact.spec.input_features), np.float32)
    rows[:, 0] = [LABELS.index(each["kind"]) if each["kind"] in LABELS else 0 for each in EVENTS]
    columns = [column.name for column in artifact.spec.columns]
    rows[:, columns.index("at.missing")] = 1
    state = np.zeros(artifact.network_state.float_size, np.float32)
    expected, _ = oracle_step(artifact.spec, artifact.weights, rows, state)
    nats = [value for part in parts for value in part["next.surprise"]]
    surprise = expected[:, artifact.outputs.slices["next.surprise"].start]
    np.testing.assert_allclose(nats, surprise, rtol=1e-4)


def test_backfills_name_categories(artifact: Artifact, tmp_path: Path) -> None:
    times = [1_370_000_000_000 + 1000 * at for at in range(len(EVENTS))]
    frame = pl.DataFrame(EVENTS).with_columns(stream=pl.lit("s"), at=pl.Series(times))
    frame.write_parquet(tmp_path / "events.parquet")
    job = job_of(artifact, [tmp_path / "events.parquet"], tmp_path / "out")
    run_backfill(job, Recording(job))
    table = pl.read_parquet(job.out / "outputs" / "*.parquet")
    assert set(table["next.category[0]"]) <= set(LABELS)
    assert table.schema["next[0]"] == pl.Float32


def test_versions_with_other_categories_are_rejected(artifact: Artifact, tmp_path: Path) -> None:
    spec = next_spec([*NAMES[:3], "other"])
    other = write_artifact(tmp_path / "other", spec, random_weights(spec))
    served: list[Any] = [ServedModel(each, NumpyRuntime(each)) for each in (artifact, other)]
    with pytest.raises(VersionRejected, match="categories"):
        check_accepts_same_requests(*served)


async def test_a_reply_with_categories_of_a_version_that_is_not_loaded_is_not_repeated(
    pipeline_server: RealServer, artifact: Artifact, tmp_path: Path
) -> None:
    """The same codes are other names, as after a deployment with a vocabulary in another order."""
    spec = next_spec(NAMES[::-1])
    other = write_artifact(tmp_path / "next", spec, random_weights(spec))
    rows = np.zeros((2, artifact.spec.input_features), np.float32)
    chunk = chunk_of(f"deployed-{tmp_path.name}", rows, 0, model="next")
    async with worker(pipeline_server.url, artifact) as pipeline:
        first = await pipeline.process(ANYONE, chunk)
        again = await pipeline.process(ANYONE, chunk)
        assert again.replayed
        np.testing.assert_array_equal(again.outputs, first.outputs)
    async with worker(pipeline_server.url, other) as pipeline:
        with pytest.raises(AlreadyApplied):
            await pipeline.process(ANYONE, chunk)


async def test_a_watcher_gets_the_names_of_categories(
    pipeline_server: RealServer, artifact: Artifact
) -> None:
    async with (
        live_application(pipeline_server, {"next": artifact}) as api,
        watched(api, model="next") as events,
    ):
        await events.expect("stream")
        path = "/v1/models/next/streams/s/chunks"
        for start in (0, 2):  # from the stored reply, and as it is published
            reply = (await api.client.post(path, json={"events": EVENTS[start : start + 2]})).json()
            if start == 0:
                await events.expect("stream")
            assert (await events.expect("outputs"))["outputs"] == reply["outputs"]


async def test_a_watcher_gets_no_names_of_categories_of_a_version_that_is_not_loaded(
    pipeline_server: RealServer, artifact: Artifact, tmp_path: Path
) -> None:
    """While a deployment replaces workers, those of both vocabularies share the store."""
    spec = next_spec(NAMES[::-1])
    other = write_artifact(tmp_path / "next", spec, random_weights(spec))
    rows = np.zeros((2, artifact.spec.input_features), np.float32)
    async with (
        live_application(pipeline_server, {"next": artifact}) as api,
        watched(api, model="next") as events,
        worker(pipeline_server.url, other) as pipeline,
    ):
        await events.expect("stream")
        outputs = pipeline._store.outputs
        await outputs.start()
        key = StreamKey("next", "s")
        await becomes(lambda: key in outputs.watched, "the announcement")
        for position in (0, 2):  # from the stored reply, and as it is published
            await pipeline.process(ANYONE, chunk_of("s", rows, position, model="next"))
            if position == 0:
                await events.expect("stream")
            assert await events.expect("gap") == {"from": position, "to": position + 2}
        await outputs.close()
