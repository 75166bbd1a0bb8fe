"""The command of the examples: trains, writes, prints reports, and reports errors in one line."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("tensorflow")

from examples.command import run_example
from models.artifact.artifact import load_artifact
from models.errors import ModelsError
from models.training import trees
from models.training.files import package_folder
from tests.support.training import latch_frame, latch_spec, train_nothing

FEW = trees.Grid((0,), (2,), (7,), (5,), 0.1, 20)


def test_example_trains_writes_and_prints_its_report(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(trees, "FULL", FEW)
    monkeypatch.setattr(trees, "SHORT", FEW)
    train_nothing(monkeypatch)
    spec, out = tmp_path / "spec.yaml", tmp_path / "model"
    spec.write_text(json.dumps(latch_spec(epochs=1).model_dump(mode="json")))

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["example", *arguments])
        run_example(
            "latch",
            spec,
            lambda: latch_frame(24),
            out,
            further_files=lambda artifact, frame: {
                "events.md": f"{artifact.spec.name}: {frame.height} events\n".encode(),
                "plots/none.png": b"",
            },
        )
        return capsys.readouterr().out

    training_output = run()
    assert "model latch, version" in training_output
    assert load_artifact(out).spec.name == "latch"
    shown_report = run("--show")
    for text in (training_output, shown_report):
        assert f"latch: {latch_frame(24).height} events" in text
        assert "| boosted trees |" in text
    assert run(str(tmp_path / "other")).endswith(" s\n")
    assert (tmp_path / "other" / "plots" / "none.png").exists()


def test_a_missing_package_is_a_one_line_error(tmp_path, monkeypatch) -> None:
    def missing() -> None:
        package_folder("no_such_package")

    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps(latch_spec(epochs=1).model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", ["example", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^latch: expected the package `no_such_package`"):
        run_example("latch", spec, missing, tmp_path)
    with pytest.raises(ModelsError, match=r"pip install 'carry\[train\]'"):
        missing()
