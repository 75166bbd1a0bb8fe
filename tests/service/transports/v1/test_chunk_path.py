"""The architecture page lists the files that a chunk passes on the fast path, and no others."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from types import FrameType

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

PAGE = ROOT / "docs" / "explanation" / "architecture.md"
_ROW = re.compile(r"^\| \d+ \| `([^`]+)` \|", re.MULTILINE)
MAX_FILES = 20
RUNTIME = "service/engine/runtimes/onnx.py"
"""Not called here: the harness computes with the float64 oracle."""

LEFT_OUT = ("service/core/values.py", "service/core/errors.py", "service/telemetry/")
"""Types, logs and metrics; the page says so."""

WARM_UP_CHUNKS = 3
"""Until the stream's state is cached and calls of the runtime are known to be short."""

TRACED_CHUNKS = 3
"""A file counts if each of them calls a function in it: not what a timer or a cache miss calls."""


def listed_files() -> list[str]:
    """The files of the table, in order."""
    return _ROW.findall(PAGE.read_text(encoding="utf-8"))


def test_chunk_passes_at_most_twenty_files() -> None:
    files = listed_files()
    assert 0 < len(files) <= MAX_FILES
    assert len(set(files)) == len(files)


async def test_chunk_passes_the_listed_files_and_no_others(
    pipeline_server: RealServer, tmp_path: Path
) -> None:
    files_called: list[set[str]] = []

    def note_file(frame: FrameType, event: str, argument: object) -> None:
        files_called[-1].add(frame.f_code.co_filename)

    artifact = make_artifact(tmp_path)
    async with harness(pipeline_server, {"probe": artifact}) as api, serving(api) as server:
        reader, writer = await asyncio.open_connection(HOST, port_of(server))
        for number in range(WARM_UP_CHUNKS + TRACED_CHUNKS):
            if number >= WARM_UP_CHUNKS:
                files_called.append(set())
                sys.setprofile(note_file)
            try:
                writer.write(request(chunk(number * len(INPUTS))))
                response = await answer(reader)
            finally:
                sys.setprofile(None)
            assert response.startswith(b"HTTP/1.1 200"), response
        writer.close()
        await writer.wait_closed()
    service = str(ROOT / "service") + "/"
    paths = {
        str(Path(name).relative_to(ROOT))
        for name in set.intersection(*files_called)
        if name.startswith(service)
    }
    traced = {path for path in paths if not path.startswith(LEFT_OUT)}
    assert traced == set(listed_files()) - {RUNTIME}
