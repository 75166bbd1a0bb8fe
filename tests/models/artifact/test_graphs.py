"""ONNX graphs of an artifact: derived from the weights, or absent with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.artifact.artifact import load_artifact
from models.artifact.fingerprint import compute_fingerprint
from models.artifact.writing import add_graph, write_artifact
from models.errors import GraphUnsupportedError
from models.onnx.graph import write_graph
from models.spec.model import parse_spec
from tests.models.artifact.artifacts import SPEC, WEIGHTS, manifest_of, seal
from tests.support.models import random_weights

ODD = parse_spec(
    {
        "name": "odd",
        "features": 1,
        "layers": [{"kind": "lstm", "units": 2, "activation": "gelu"}],
        "heads": [{"kind": "sequence", "name": "h"}],
    }
)
"""A model that no graph can hold."""


def graphless(path: Path) -> dict[str, Any]:
    """Make the artifact one from before there were graphs; its manifest."""
    manifest = manifest_of(path)
    for key in ("graph", "graph_refused", "runtimes"):
        manifest.pop(key, None)
    manifest["files"].pop("graph.onnx", None)
    (path / "graph.onnx").unlink(missing_ok=True)
    seal(path, manifest)
    return manifest_of(path)


def test_a_model_without_a_graph_states_the_reason(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "odd", ODD, random_weights(ODD))

    assert artifact.graphs.data is None
    assert "'gelu'" in str(artifact.graphs.rejection)
    assert artifact.manifest["graph_refused"] == artifact.graphs.rejection
    assert artifact.manifest["runtimes"] == ["tensorflow"]
    assert set(artifact.manifest["files"]) == {"weights.safetensors"}


def test_add_graph_keeps_the_rest_of_an_artifact(artifact_dir: Path) -> None:
    written = load_artifact(artifact_dir)
    (artifact_dir / "notes.txt").write_text("mine")
    before = graphless(artifact_dir)
    assert load_artifact(artifact_dir).graphs == written.graphs

    artifact = add_graph(artifact_dir)

    assert (artifact_dir / "graph.onnx").read_bytes() == artifact.graphs.data
    assert artifact.version == written.version
    assert artifact.manifest == written.manifest
    kept = {key: value for key, value in before.items() if key not in ("checksum", "files")}
    assert kept.items() <= artifact.manifest.items()
    assert (artifact_dir / "notes.txt").read_text() == "mine"
    assert not [entry.name for entry in artifact_dir.iterdir() if entry.name.startswith(".")]
    assert add_graph(artifact_dir).manifest == written.manifest


def test_add_graph_records_why_there_is_none(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    written = write_artifact(path, ODD, random_weights(ODD))
    graphless(path)

    with pytest.raises(GraphUnsupportedError, match="'gelu'"):
        add_graph(path)

    assert load_artifact(path).manifest == written.manifest


def test_add_graph_is_crash_safe(artifact_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    replace = Path.replace

    def watched(source: Path, target: Path) -> Path:
        seen.append(load_artifact(artifact_dir).manifest.get("graph"))
        done = replace(source, target)
        seen.append(load_artifact(artifact_dir).manifest.get("graph"))
        return done

    monkeypatch.setattr(Path, "replace", watched)
    add_graph(artifact_dir)

    assert seen == ["graph.onnx", None, None, None, None, "graph.onnx"]


def test_graphs_are_derived_from_weights_and_not_read_from_files(artifact_dir: Path) -> None:
    other = random_weights(SPEC, seed=9)
    marks = [compute_fingerprint(SPEC, weights).hex().encode() for weights in (other, WEIGHTS)]
    (artifact_dir / "graph.onnx").write_bytes(write_graph(SPEC, other).replace(*marks))
    seal(artifact_dir, manifest_of(artifact_dir))

    artifact = load_artifact(artifact_dir)

    assert artifact.fingerprint == compute_fingerprint(SPEC, WEIGHTS)
    assert artifact.graphs.data == write_graph(SPEC, WEIGHTS)
    assert artifact.differing_graphs == ["graph.onnx"]
    assert add_graph(artifact_dir).differing_graphs == []


def test_adding_a_graph_removes_no_other_file(artifact_dir: Path) -> None:
    manifest = manifest_of(artifact_dir)
    manifest["graph"] = "report.json"
    seal(artifact_dir, manifest)

    assert "report.json" in add_graph(artifact_dir).manifest["files"]
