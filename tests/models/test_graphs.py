"""Graphs in an artifact: added to an old one, and what is said where there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from models.artifact import add_graph, load_artifact, write_artifact
from models.errors import ArtifactError, GraphUnsupportedError
from models.spec import parse_spec
from tests.models.artifacts import SPEC, WEIGHTS, manifest_of, seal
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


def test_a_model_that_no_graph_can_hold_says_why(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "odd", ODD, random_weights(ODD))

    assert artifact.graph is None
    assert "'gelu'" in str(artifact.graph_refused)
    assert artifact.manifest["runtimes"] == ["tensorflow"]
    assert set(artifact.manifest["files"]) == {"weights.safetensors"}


def test_an_old_artifact_gets_its_graph_and_keeps_the_rest(made: Path) -> None:
    written = load_artifact(made)
    (made / "notes.txt").write_text("mine")
    before = graphless(made)
    assert (load_artifact(made).graph, load_artifact(made).graph_refused) == (None, None)

    artifact = add_graph(made)

    assert artifact.graph == written.graph
    assert artifact.version == written.version
    assert artifact.manifest == written.manifest
    kept = {key: value for key, value in before.items() if key not in ("checksum", "files")}
    assert kept.items() <= artifact.manifest.items()
    assert (made / "notes.txt").read_text() == "mine"
    assert not [entry.name for entry in made.iterdir() if entry.name.startswith(".")]
    assert add_graph(made).manifest == written.manifest


def test_an_old_artifact_that_no_graph_can_hold_learns_why(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    written = write_artifact(path, ODD, random_weights(ODD))
    graphless(path)

    with pytest.raises(GraphUnsupportedError, match="'gelu'"):
        add_graph(path)

    assert load_artifact(path).manifest == written.manifest


def test_every_moment_of_a_new_graph_is_a_whole_artifact(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = load_artifact(made).graph
    seen: list[bytes | None] = []
    replace = Path.replace

    def watched(source: Path, target: Path) -> Path:
        seen.append(load_artifact(made).graph)
        done = replace(source, target)
        seen.append(load_artifact(made).graph)
        return done

    monkeypatch.setattr(Path, "replace", watched)
    add_graph(made)

    assert seen == [graph, None, None, None, None, graph]


def test_packaging_without_onnx_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "models.onnx.graph", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)

    with pytest.raises(ArtifactError, match="needs 'onnx': pip install onnx"):
        write_artifact(tmp_path / "a", SPEC, WEIGHTS)
