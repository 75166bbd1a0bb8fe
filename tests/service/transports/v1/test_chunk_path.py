"""What a chunk costs on the fast path: how many files it passes, and how many functions are called
for a key's check and for a rejection. No noise touches these counts."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import pytest

from models.artifact.artifact import Artifact
from service.access.limits import KeyLimits
from tests.service.transports.v1.harness import harness
from tests.service.transports.v1.raw_http import (
    HOST,
    INPUTS,
    answer,
    chunk,
    port_of,
    request,
    serving,
)
from tests.support.pages import ROOT
from tests.support.pipelines import make_artifact
from tests.support.servers import RealServer

MAX_FILES = 20
LEFT_OUT = ("core/values.py", "core/errors.py", "telemetry/")
"""Types, logs and metrics."""

WARM_UP_CHUNKS = 4
"""Until the stream's state is cached and calls of the runtime are known to be short."""

TRACED_CHUNKS = 5
"""The least counts: not what a timer or a cache miss calls."""

SERVICE = str(ROOT / "service") + "/"
LIMITS = KeyLimits(requests_per_s=1e6, events_per_s=1e7, concurrent_requests=9_000, streams=9_000)


@pytest.fixture
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Artifact]:
    return {"probe": make_artifact(tmp_path_factory.mktemp("path"))}


async def traced(
    server: RealServer,
    models: Mapping[str, Artifact],
    status: int = 200,
    *,
    key: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[set[str], int]:
    """The files whose functions each chunk calls, and the number of calls.

    Args:
        key: scope and limits of the access key of the chunks; None for none.
    """
    names, counts = list[list[str]](), list[int]()

    def note_file(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(SERVICE):
            names[-1].append(frame.f_code.co_filename.removeprefix(SERVICE))

    required = None if key is None else True
    async with (
        harness(server, models, requires_keys=required, **options) as api,
        serving(api) as listening,
    ):
        lines = [] if key is None else [f"Authorization: {await api.key(**key)}"]
        reader, writer = await asyncio.open_connection(HOST, port_of(listening))
        for number in range(WARM_UP_CHUNKS + TRACED_CHUNKS):
            names.append([])
            if number >= WARM_UP_CHUNKS:
                sys.setprofile(note_file)
            try:
                writer.write(request(chunk(number * len(INPUTS)), *lines))
                response = await answer(reader)
            finally:
                sys.setprofile(None)
            assert response.startswith(b"HTTP/1.1 %d" % status), response
        writer.close()
        await writer.wait_closed()
    counts = [len(each) for each in names[WARM_UP_CHUNKS:]]
    return set.intersection(*map(set, names[WARM_UP_CHUNKS:])), min(counts)


async def test_chunk_passes_few_files_and_its_rejection_costs_a_fraction(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> None:
    files, served = await traced(pipeline_server, models)
    passed = {file for file in files if not file.startswith(LEFT_OUT)}
    # the runtime is not called: the harness computes with the float64 oracle
    assert "transports/v1/fast_path.py" in passed
    assert len(passed) < MAX_FILES, sorted(passed)
    _, rejected = await traced(pipeline_server, models, 429, max_queue=0)
    assert rejected <= 0.3 * served, (rejected, served)


async def test_an_access_key_adds_few_calls_to_a_chunk(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> None:
    """Neither its check nor its limits reach the store."""
    _, without = await traced(pipeline_server, models)
    _, checked = await traced(pipeline_server, models, key={"models": ("pro*",), "prefix": "s"})
    _, limited = await traced(pipeline_server, models, key={"limits": LIMITS})
    assert checked <= without + 1, (checked, without)
    assert limited <= without + 8, (limited, without)
