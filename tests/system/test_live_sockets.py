"""Live sockets and watches of a real service with two workers: kills, and a graceful shutdown."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import websockets.client
from websockets.asyncio.client import connect

from tests.support.pages import ROOT, blocks
from tests.support.service import Service, running

PAGE = "docs/reference/websocket.md"
EVENTS: list[dict[str, Any]] = json.loads((ROOT / "examples/departures.json").read_bytes())[
    "EWR-UA"
]
STREAM = "/v1/models/flights/streams/EWR-UA"


@pytest.fixture
def service(tmp_path: Path, model_dir: Path) -> Iterator[Service]:
    """A service that the test may break."""
    with running(tmp_path, model_dir, "--workers", "2") as up:
        yield up


def kill_workers(service: Service) -> None:
    """Kill the workers that are ready; the service starts others."""
    for pid in service.ready_workers():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def documented_client(service: Service) -> Callable[..., Any]:
    """The Python client of the how-to page."""
    (script,) = (text for language, text in blocks(PAGE) if language == "python")
    names: dict[str, Any] = {}
    address = service.url.removeprefix("http://")
    exec(compile(script.replace("127.0.0.1:8000", address), PAGE, "exec"), names)
    stream: Callable[..., Any] = names["stream"]
    return stream


async def test_sockets_and_watches_survive_kills_and_drain(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websockets.client, "BACKOFF_INITIAL_DELAY", 0.2)
    replies: list[dict[str, Any]] = []

    def on_reply(reply: dict[str, Any]) -> None:
        replies.append(reply)
        if len(replies) == 4:
            kill_workers(service)

    async with asyncio.timeout(60), httpx.AsyncClient(base_url=service.url, timeout=30) as client:
        stream = documented_client(service)
        await stream(lambda position: EVENTS[position : position + 1], len(EVENTS), on_reply)
        head = (await client.get(STREAM)).json()
        assert head["position"] == len(EVENTS)

        whole = await client.post(STREAM + "-whole/chunks", json={"events": EVENTS})
        expected = np.array(whole.json()["outputs"]["late"])
        positions = [reply["position"] for reply in replies]
        assert positions == sorted(set(positions))
        for reply in replies:
            outputs = np.array(reply["outputs"]["late"])
            np.testing.assert_allclose(outputs[0], expected[reply["position"] - 1], atol=1e-5)

        async with (
            client.stream("GET", STREAM + "/outputs", params={"from": 0}) as response,
            connect(service.url.replace("http", "ws") + STREAM + "/live") as socket,
        ):
            lines = response.aiter_lines()
            assert json.loads(await socket.recv())["hello"]["position"] == len(EVENTS)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(4):
                    # each by a connection, and so a worker, of its own
                    tasks.create_task(append(service))
            events = [event async for event in named(lines, 7)]
            kinds = [name for name, _ in events]
            assert kinds == ["stream", "gap", *["outputs"] * 5]
            stopped = asyncio.to_thread(service.stop)
            stopping = asyncio.create_task(stopped)
            await socket.wait_closed()
            assert socket.close_code == 1012
            assert [event async for event in named(lines, 1)] == [("end", {"reason": "draining"})]
        assert await stopping == 0


async def append(service: Service) -> None:
    """Append one event."""
    async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
        response = await client.post(STREAM + "/chunks", json={"events": EVENTS[-1:]})
        response.raise_for_status()


async def named(lines: Any, count: int) -> Any:
    """Names and data of the next events."""
    name = ""
    async for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))
            count -= 1
            if not count:
                return
