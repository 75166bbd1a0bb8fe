"""The example of a transport: chunks as lines over a Unix socket, on a real store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.json_lines import JsonLines
from service.access.caller import Verb
from service.build import PipelineService, build_pipeline
from service.settings import Settings
from tests.support.access import new_authorization
from tests.support.pipelines import make_artifact
from tests.support.servers import real_server

ROWS = [[0.5, -0.5, 0.0], [0.25, 1.0, 2.0]]
LIMIT = 4096


class Lines:
    """One connection."""

    def __init__(self, path: Path):
        self._path = path

    async def ask(self, *lines: bytes) -> list[dict[str, Any]]:
        """The answers to lines that are sent together, up to the end of the connection."""
        reader, writer = await asyncio.open_unix_connection(self._path)
        writer.write(b"".join(lines))
        writer.write_eof()
        answers = (await reader.read()).splitlines()
        writer.close()
        return [json.loads(answer) for answer in answers]


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[PipelineService]:
    """The pipeline of settings, with the probe model on an empty store."""
    artifact = make_artifact(tmp_path)
    with real_server("valkey") as server:
        settings = Settings.load({"redis_url": server.url, "models_dir": artifact.path})
        settings = replace(settings, requests=replace(settings.requests, max_body_bytes=LIMIT))
        async with build_pipeline(settings) as running:
            yield running


@pytest.fixture
async def lines(service: PipelineService, tmp_path: Path) -> AsyncIterator[Lines]:
    """Connections to the transport."""
    path = tmp_path / "lines.sock"
    server = await asyncio.start_unix_server(JsonLines(service).serve, path, limit=LIMIT)
    async with server:
        yield Lines(path)


def chunk(position: int, stream: str = "s", key: str = "-") -> bytes:
    body = json.dumps({"position": position, "inputs": ROWS})
    return f"probe {stream} {key} {body}\n".encode()


async def test_chunks_are_applied_exactly_once(lines: Lines) -> None:
    first, second = await lines.ask(chunk(0), chunk(2))
    assert (first["position"], second["position"], second["replayed"]) == (2, 4, False)
    again, ahead = await lines.ask(chunk(2), chunk(9))
    assert again["replayed"]
    assert again["outputs"] == second["outputs"]
    assert (ahead["code"], ahead["expected"], ahead["retryable"]) == ("position_ahead", 4, False)


async def test_wrong_lines_get_the_errors_of_the_api(lines: Lines) -> None:
    wrong = [b"probe s\n", b"probe s - {}\n", b"other s - {}\n", b"probe a*b - {}\n"]
    answers = await lines.ask(*wrong, chunk(0), b"x" * (2 * LIMIT) + b"\n", chunk(2))
    codes = ["malformed_body", "invalid_input", "model_not_found", "invalid_name", None]
    assert [answer.get("code") for answer in answers] == [*codes, "body_too_large"]


async def test_a_key_allows_its_streams_only(service: PipelineService, lines: Lines) -> None:
    stored = service.store.keys
    authorization = await new_authorization(stored, verbs=(Verb.PREDICT,), prefix="a:")
    await service.keys.refresh()
    key = authorization.removeprefix("Bearer ")
    mine, other, none = await lines.ask(chunk(0, "a:1", key), chunk(0, "b:1", key), chunk(0, "a:1"))
    assert mine["position"] == 2
    assert (other["code"], none["code"]) == ("forbidden", "unauthenticated")
