"""The architecture page lists the files that a chunk passes, and a chunk passes them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType

from models.artifact.artifact import write_artifact
from tests.service.transports.http.harness import harness
from tests.service.transports.http.test_documentation import flights_spec
from tests.support.oracle import contracting_weights
from tests.support.pages import ROOT
from tests.support.servers import RealServer

PAGE = ROOT / "docs" / "explanation" / "architecture.md"
_ROW = re.compile(r"^\| \d+ \| `([^`]+)` \|", re.MULTILINE)
MOST_FILES = 20
RUNTIME = "service/engine/runtimes/onnx.py"
"""Not called here: the harness computes with the float64 oracle."""


def listed_files() -> list[str]:
    """The files of the table, in order."""
    return _ROW.findall(PAGE.read_text(encoding="utf-8"))


def test_chunk_passes_at_most_twenty_files() -> None:
    files = listed_files()
    assert 0 < len(files) <= MOST_FILES
    assert len(set(files)) == len(files)


async def test_chunk_passes_every_listed_file(pipeline_server: RealServer, tmp_path: Path) -> None:
    spec = flights_spec()
    artifact = write_artifact(tmp_path / "flights", spec, contracting_weights(spec, 5))
    called: set[str] = set()

    def note_file(frame: FrameType, event: str, argument: object) -> None:
        called.add(frame.f_code.co_filename)

    chunk = (ROOT / "examples" / "first-chunk.json").read_bytes()
    async with harness(pipeline_server, {"flights": artifact}, fast_path=True) as api:
        sys.setprofile(note_file)
        try:
            response = await api.chunk(chunk, stream="EWR-UA", model="flights")
        finally:
            sys.setprofile(None)
    assert response.status_code == 200, response.text
    assert [name for name in listed_files() if str(ROOT / name) not in called] == [RUNTIME]
