"""The guides to moving from another server as notebooks, which Jupyter's client executes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from tests.support.kafka import running_broker
from tests.support.needs import needs_tools
from tests.support.pages import ROOT, blocks
from tests.support.servers import free_port, real_server

pytestmark = needs_tools("bash", "curl")


class Notebooks:
    """The notebooks, and the addresses by which a test replaces those of the guides."""

    def __init__(self, folder: Path, addresses: dict[str, str]):
        self.folder, self.addresses = folder, addresses
        subprocess.run([sys.executable, ROOT / "scripts" / "notebooks", folder], check=True)

    def run(self, guide: str) -> list[str]:
        """Execute a notebook as a person would, and return what its cells print."""
        notebook = nbformat.read(self.folder / f"{guide}.ipynb", 4)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for cell in cells:
            for written, used in self.addresses.items():
                cell.source = cell.source.replace(written, used)
        resources = {"metadata": {"path": str(self.folder)}}
        NotebookClient(notebook, timeout=280, resources=resources, coalesce_streams=True).execute()
        return ["".join(each.get("text", "") for each in cell.outputs) for cell in cells]


@pytest.fixture
def notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebooks]:
    """Notebooks that use a store and a port of the test."""
    port = free_port()
    monkeypatch.setenv("CARRY_PORT", str(port))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with real_server("valkey") as server:
        yield Notebooks(
            tmp_path,
            {"redis://localhost:6379": server.url, "127.0.0.1:8000": f"127.0.0.1:{port}"},
        )


def test_guide_moves_a_state_from_fastapi(notebooks: Notebooks) -> None:
    *_, moved, sent, chunk, _ = notebooks.run("move-from-fastapi")
    assert moved == "moved 1, kept 0\n"
    assert sent.startswith("5 [[")
    assert json.loads(chunk)["position"] == 6


def test_guide_prints_the_outputs_of_triton(notebooks: Notebooks) -> None:
    printed = "".join(notebooks.run("move-from-triton")).splitlines()
    page = [
        text for language, text in blocks("docs/how-to/move-from-triton.md") if language == "text"
    ]
    assert page[0].strip() in printed
    numbers = [float(line) for line in printed if line.startswith("0.")]
    np.testing.assert_allclose(numbers, [float(each) for each in page[1].split()], atol=1e-5)


def test_guide_continues_states_of_tensorflow_serving(notebooks: Notebooks) -> None:
    pytest.importorskip("keras")
    *_, compared, _ = notebooks.run("move-from-tf-serving")
    assert compared == "True\nTrue\n"


def test_guide_computes_the_outputs_of_stream_processors(notebooks: Notebooks) -> None:
    guide = "move-from-stream-processors"
    (expected,) = (
        text for language, text in blocks(f"docs/how-to/{guide}.md") if language == "json"
    )
    with running_broker() as broker:
        notebooks.addresses["localhost:9092"] = broker.servers
        for topic in ("readings", "scores-of-carry"):
            broker.create(topic, 1)
        *_, printed, _ = notebooks.run(guide)
        records = broker.read_all("scores-of-carry", 1)
    outputs = [json.loads(line) for line in printed.splitlines()]
    np.testing.assert_allclose(outputs, json.loads(expected), atol=1e-5)
    assert [each.key() for each in records] == [b"pump-1"] * 4
    assert [dict(each.headers())["position"] for each in records] == [b"0", b"1", b"2", b"3"]
