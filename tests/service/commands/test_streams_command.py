"""`carry streams`: one stream or many of a running service, by its HTTP API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from carry.cli import app
from carry_client import Carry
from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from service.access.caller import ANYONE, Caller
from service.core.values import StreamKey, StreamState
from service.pipeline.streams import StreamAdministration
from tests.service.transports.v1.harness import Harness, harness
from tests.service.transports.v1.raw_http import port_of, serving
from tests.support.pipelines import chunk_of, rows_of
from tests.support.servers import RealServer
from tests.support.versions import stop_polling


class Commands:
    """`carry streams` against one service."""

    def __init__(self, api: Harness, url: str):
        self.api = api
        self._url = url

    async def __call__(self, *words: str, answer: str = "") -> Result:
        return await asyncio.to_thread(
            CliRunner().invoke, app, ["streams", *words, "--url", self._url], input=answer
        )

    async def fill(self, *streams: str) -> None:
        """Create streams."""
        rows = rows_of(np.random.default_rng(60), 3)
        chunks = (chunk_of(stream, rows, 0) for stream in streams)
        await asyncio.gather(*(self.api.pipeline.process(ANYONE, chunk) for chunk in chunks))

    def make_old(self, *streams: str) -> None:
        """Mark states as written by another version of the model."""
        for stream in streams:
            key = StreamKey("probe", stream)
            states = self.api.store.states
            states[key] = states[key]._replace(fingerprint=b"another version.")

    def streams(self) -> list[str]:
        """The names of all streams."""
        return sorted(key.stream for key in self.api.store.states)


@pytest.fixture
async def carry(
    pipeline_server: RealServer, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Commands]:
    # what a failed poll logs would be in the output of the command, which runs in this process
    stop_polling(monkeypatch)
    history = HistorySpec(events=8)
    models = {"probe": artifact}
    async with harness(pipeline_server, models, history=history) as api, serving(api) as server:
        yield Commands(api, f"http://127.0.0.1:{port_of(server)}")


MANY = [f"d{i:03}" for i in range(250)]


async def test_list_and_show(carry: Commands) -> None:
    await carry.fill("a1", "a2", "b1")
    listed = await carry("list", "probe", "--prefix", "a")
    assert sorted(listed.stdout.split()) == ["a1", "a2"], listed.stderr
    shown = await carry("show", "probe", "b1")
    assert '"position": 3' in shown.stdout
    missing = await carry("show", "probe", "none")
    assert missing.exit_code == 1
    assert "stream_not_found" in missing.stderr


async def test_delete_one_or_all_with_a_prefix(
    carry: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carry_client.models.DELETE_LIMIT", 20)
    await carry.fill(*MANY, "other")
    deleted = await carry("delete", "probe", "other", "--yes")
    assert (deleted.exit_code, deleted.stdout) == (0, "deleted other\n")
    missing = await carry("delete", "probe", "other", "--yes")
    assert missing.exit_code == 1
    assert missing.stderr.startswith("carry: stream_not_found: ")
    kept = await carry("delete", "probe", "--prefix", "d", answer="n\n")
    assert kept.exit_code == 1
    assert "Delete all streams that begin with 'd' of model probe? [y/N]" in kept.output
    assert len(carry.streams()) == len(MANY)
    some = await carry("delete", "probe", "--prefix", "d1", answer="y\n")
    assert some.stdout.endswith("deleted 100 streams\n")
    rest = await carry("delete", "probe", "--prefix", "", "--yes")
    assert rest.stdout == "deleted 150 streams\n"
    assert carry.streams() == []
    for words in ((), ("one", "--prefix", "two")):
        assert (await carry("delete", "probe", *words, "--yes")).exit_code == 2


async def test_history_and_rewind(carry: Commands) -> None:
    await carry.fill("s")
    kept = json.loads((await carry("history", "probe", "s", "--from", "1", "--limit", "1")).stdout)
    assert (kept["available"], kept["next"]) == ([[0, 3]], 2)
    assert [len(chunk["inputs"]) for chunk in kept["chunks"]] == [1]
    no = await carry("rewind", "probe", "s", "1", answer="n\n")
    assert no.exit_code == 1
    assert "Take stream s of model probe from position 3 to 1? [y/N]" in no.output
    assert carry.api.position() == 3
    done = await carry("rewind", "probe", "s", "1", answer="y\n")
    assert done.exit_code == 0
    assert "rewound s to position 1, epoch " in done.stdout
    assert carry.api.position() == 1
    gone = await carry("rewind", "probe", "s", "3", "--yes")
    assert gone.exit_code == 1
    assert gone.stderr.startswith("carry: position_unavailable: ")
    assert (await carry("history", "probe", "none")).exit_code == 1


async def test_rewind_keeps_a_stream_that_changed_meanwhile(
    carry: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    await carry.fill("s")
    rewind = StreamAdministration.rewind

    async def late(streams: StreamAdministration, *arguments: Any) -> StreamState:
        chunk = chunk_of("s", rows_of(np.random.default_rng(61), 2), 3)
        await carry.api.pipeline.process(ANYONE, chunk)
        return await rewind(streams, *arguments)

    monkeypatch.setattr(StreamAdministration, "rewind", late)
    done = await carry("rewind", "probe", "s", "1", "--yes")
    assert done.exit_code == 1
    assert done.stderr.startswith("carry: state_changed: ")
    assert carry.api.position() == 5


async def test_reset_deletes_only_states_of_other_versions(carry: Commands) -> None:
    await carry.fill(*(f"s{i}" for i in range(20)), "t1")
    carry.make_old("s3", "s7", "t1")
    done = await carry("reset", "probe", "--prefix", "s", "--yes")
    assert done.exit_code == 0
    assert done.stdout.startswith("reset 2 streams, kept 18 of version ")
    left = [f"s{i}" for i in range(20) if i not in (3, 7)]
    assert carry.streams() == sorted([*left, "t1"])
    assert (await carry("reset", "probe", "t1", answer="y\n")).exit_code == 0
    assert "t1" not in carry.streams()
    kept = await carry("reset", "probe", "s1", "--yes")
    assert kept.stdout.startswith("reset 0 streams, kept 1 of version ")
    missing = await carry("reset", "probe", "none", "--yes")
    assert (missing.exit_code, missing.stderr) == (1, "carry: model probe has no stream none\n")


async def test_reset_keeps_streams_that_changed_meanwhile(
    carry: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client creates the stream again between the read of its version and the deletion."""
    await carry.fill("s1")
    carry.make_old("s1")
    delete = StreamAdministration.delete
    took_over: list[StreamKey] = []

    async def late(
        streams: StreamAdministration, caller: Caller, key: StreamKey, *rest: Any
    ) -> None:
        if not took_over:
            took_over.append(key)
            del carry.api.store.states[key]
            await carry.fill(key.stream)
        await delete(streams, caller, key, *rest)

    monkeypatch.setattr(StreamAdministration, "delete", late)
    done = await carry("reset", "probe", "--prefix", "", "--yes")
    assert done.stdout.startswith("reset 0 streams, kept 1 of version ")
    assert took_over
    assert carry.streams() == ["s1"]


async def test_reset_keeps_and_reports_damaged_streams(
    carry: Commands, damage: Callable[[str], None]
) -> None:
    await carry.fill("s1", "s2", "s3")
    carry.make_old("s1", "s2")
    damage("s2")
    done = await carry("reset", "probe", "--prefix", "s", "--yes")
    assert done.exit_code == 1
    assert "\nreset 1 streams, kept 1 of version " in "\n" + done.stdout
    assert done.stderr == "carry: 1 damaged streams were kept; restore or delete them\n"
    assert (await carry("delete", "probe", "s2", "--yes")).exit_code == 0
    assert carry.streams() == ["s3"]


async def test_requests_that_cannot_be_sent_are_reported(
    carry: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    unavailable = Commands(carry.api, "http://127.0.0.1:1")
    with monkeypatch.context() as short:
        # a list is retried for two minutes
        short.setitem(Carry.__init__.__kwdefaults__, "deadline_s", 0.1)
        for words in (("list", "probe"), ("reset", "probe", "--prefix", "", "--yes")):
            failed = await unavailable(*words)
            assert failed.exit_code == 1
            first, last = failed.stderr.splitlines()
            assert first.startswith("carry: expected an answer from http://127.0.0.1:1, got ")
            assert first.endswith("; trying again")
            assert last.startswith("carry: http://127.0.0.1:1 does not answer")
    await carry.fill("a")
    for name in (".", ".."):
        for words in (("show", "probe", name), ("delete", "probe", name, "--yes")):
            failed = await carry(*words)
            assert failed.exit_code == 1
            assert f"neither . nor .., got {name!r}" in failed.output
    assert carry.streams() == ["a"]
