"""The tutorial notebook, executed by Jupyter's client against a service."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.service import Service

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def texts(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """The text that each cell of code shows."""
    return [
        [each.get("text") or each["data"]["text/plain"] for each in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_tutorial_shows_the_real_outputs(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARRY_URL", service.url)
    notebook = nbformat.read(EXAMPLES / "tutorial.ipynb", 4)
    shown = texts(notebook)
    resources = {"metadata": {"path": str(EXAMPLES)}}
    # on a busy machine the kernel may send what a cell prints in several pieces
    options = {"timeout": 60, "resources": resources, "coalesce_streams": True}
    NotebookClient(notebook, **options).execute()
    for ours, theirs in zip(texts(notebook), shown, strict=True):
        ours_text, shown_text = "\n".join(ours), "\n".join(theirs)
        assert NUMBER.sub("", ours_text) == NUMBER.sub("", shown_text)
        numbers = [[float(each) for each in NUMBER.findall(t)] for t in (ours_text, shown_text)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.006)
