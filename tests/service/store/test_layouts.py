"""Stores that earlier versions of Carry wrote are opened, and their streams continued.

`layouts/` has a sample for each layout of the store: every key as that version wrote it, the
artifact, and what was sent and answered. `layouts/__main__.py` records another one.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import redis
from numpy.typing import NDArray

from models.artifact.artifact import load_artifact
from service.core.values import StreamKey
from service.store.backup import BackupReader, restore_backup
from service.store.embedded import EmbeddedValkey
from service.store.history_codec import HistoryCodec
from tests.service.store.layouts.__main__ import read_key, write_key
from tests.service.transports.v1.harness import Harness, harness
from tests.support.oracle import oracle_step
from tests.support.servers import RealServer


def _document(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "store.json").read_text())
    return document


SAMPLES = sorted(path.parent for path in (Path(__file__).parent / "layouts").glob("*/store.json"))
WITH_TOKENS = [folder for folder in SAMPLES if _document(folder)["token"]]
WITH_HISTORY = [
    folder for folder in SAMPLES if any(":h:" in name for name in _document(folder)["keys"])
]
WITH_BACKUP = [folder for folder in SAMPLES if (folder / "backup").exists()]
MORE = [[0.25, -1.0, 0.5], [1.5, 0.0, -0.75]]
"""Rows that are sent to each stream."""


class Sample(NamedTuple):
    """A store of an earlier version behind the service of this one.

    Attributes:
        document: see `layouts/__main__.py`.
    """

    folder: Path
    document: dict[str, Any]
    api: Harness

    def expected(self, rows: list[list[float]]) -> NDArray[np.float64]:
        """Outputs [T, O] of the whole sequence, by the float64 oracle."""
        artifact = self.api.models["probe"]
        inputs = np.asarray(rows, np.float32)
        return oracle_step(artifact.spec, artifact.weights, inputs, artifact.state.zero().floats)[0]

    def assert_outputs(self, reply: dict[str, Any], rows: list[list[float]]) -> None:
        """The reply to the last rows has the outputs of the whole sequence."""
        outputs = np.concatenate([np.asarray(each) for each in reply["outputs"].values()], axis=1)
        expected = self.expected(rows)[-len(outputs) :]
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def _name(folder: Path) -> str:
    return folder.name


@pytest.fixture(params=SAMPLES, ids=_name)
async def sample(request: pytest.FixtureRequest, server: RealServer) -> AsyncIterator[Sample]:
    """Each sample, in each kind of server."""
    folder: Path = request.param
    document = _document(folder)
    async with harness(server, {"probe": load_artifact(folder / "model")}) as api:
        with server.client() as client:
            keys = document["keys"]
            # the service has written its own, which a later one must accept
            meta = json.loads(base64.b64decode(keys["carry:meta"]))
            assert meta == json.loads(client.get("carry:meta"))
            for name, value in keys.items():
                write_key(client, name, value)
        yield Sample(folder, document, api)


async def test_streams_of_every_layout_are_answered_and_continued(sample: Sample) -> None:
    for stream, sent in sample.document["streams"].items():
        if stream == "deleted":
            continue
        again = (await sample.api.chunk(sent["last"], stream=stream)).json()
        # newer versions say more
        assert {**again, **sent["reply"], "replayed": True} == again
        position = sent["reply"]["position"]
        body = {"position": position, "epoch": again["epoch"], "inputs": MORE}
        reply = (await sample.api.chunk(body, stream=stream)).json()
        assert (reply["position"], reply["replayed"]) == (position + len(MORE), False)
        sample.assert_outputs(reply, sent["inputs"] + MORE)


async def test_deleted_streams_of_every_layout_start_over(sample: Sample) -> None:
    sent = sample.document["streams"]["deleted"]
    body = {"position": sent["reply"]["position"], "inputs": MORE}
    ahead = await sample.api.chunk(body, stream="deleted")
    assert (ahead.status_code, ahead.json()["code"]) == (409, "position_ahead")
    reply = (await sample.api.chunk({"position": 0, "inputs": MORE}, stream="deleted")).json()
    assert reply["epoch"] != sent["reply"]["epoch"]
    sample.assert_outputs(reply, MORE)


@pytest.mark.parametrize("folder", SAMPLES, ids=_name)
def test_embedded_stores_of_every_layout_are_opened(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "appendonlydir", tmp_path / "appendonlydir")
    document = _document(folder)
    # replies and tombstones have expired
    kept = [name for name in document["keys"] if ":r:" not in name and ":deleted" not in name]
    assert len(kept) >= len(document["streams"])
    valkey = EmbeddedValkey(tmp_path)
    valkey.start()
    try:
        with redis.Redis(unix_socket_path=valkey.url.removeprefix("unix://")) as client:
            for name in kept:
                assert read_key(client, name) == document["keys"][name], name
    finally:
        valkey.stop()


@pytest.mark.parametrize("sample", WITH_HISTORY, indirect=True, ids=_name)
async def test_histories_of_every_layout_are_read(sample: Sample) -> None:
    """Also by a version that keeps none: they lead to the stored states."""
    artifact, store = sample.api.models["probe"], sample.api.store
    codec = HistoryCodec(None, artifact.spec.input_features)
    for stream, sent in sample.document["streams"].items():
        rows = np.asarray(sent["inputs"], np.float32)
        key = StreamKey("probe", stream)
        history = await store.histories.read(key, artifact.fingerprint, sent["reply"]["position"])
        assert history.is_valid == (stream != "deleted")
        entries = [codec.decode(value).steps.rows for value in history.entries]
        kept = np.concatenate([np.zeros((0, 3), np.float32), *filter(_is_some, entries)])
        np.testing.assert_array_equal(kept, rows[len(rows) - len(kept) :])
        assert len(kept) == {"several": 6, "restored": 2, "deleted": 0}.get(stream, len(rows))
        assert (history.snapshot is None) == (stream in ("deleted", "source"))


def _is_some(value: object) -> bool:
    return value is not None


@pytest.mark.parametrize("sample", WITH_TOKENS, indirect=True, ids=_name)
async def test_state_tokens_of_every_layout_are_continued(sample: Sample) -> None:
    token = sample.document["token"]
    sequence = {"inputs": MORE, "state_token": token["token"]}
    url = "/v1/models/probe/predict"
    response: httpx.Response = await sample.api.client.post(url, json={"sequences": [sequence]})
    (prediction,) = response.json()["predictions"]
    sample.assert_outputs(prediction, token["inputs"] + MORE)


@pytest.mark.parametrize("sample", WITH_BACKUP, indirect=True, ids=_name)
async def test_backups_of_every_layout_are_restored(sample: Sample) -> None:
    path = sample.folder / "backup"
    streams = {name: sent for name, sent in sample.document["streams"].items() if name != "deleted"}
    for name in streams:
        await sample.api.client.delete(f"/v1/models/probe/streams/{name}")
    reader = BackupReader(io.BytesIO(path.read_bytes()))
    store = sample.api.store._store
    done = await restore_backup(
        store, reader, model=None, prefix="", replace=True, report=lambda _: None
    )
    assert done.streams == len(streams)
    for name, sent in streams.items():
        body = {"position": sent["reply"]["position"], "inputs": MORE}
        reply = (await sample.api.chunk(body, stream=name)).json()
        sample.assert_outputs(reply, sent["inputs"] + MORE)
