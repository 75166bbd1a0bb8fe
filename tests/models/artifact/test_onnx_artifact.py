"""Artifacts of imported graphs: what their fingerprint covers, and how files are verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from models.artifact.artifact import Artifact, load_artifact
from models.artifact.fingerprint import compute_fingerprint
from models.artifact.writing import add_graph, write_artifact
from models.errors import ArtifactError, SpecError
from models.spec.model import parse_spec
from tests.support.onnx_graphs import EXAMPLES, import_here
from tests.support.onnx_variants import excess, plain, repeated


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("onnx")
    return import_here(
        EXAMPLES / "torch_lstm.onnx", folder / "out", "m", initial=("h0=0.25",)
    ).artifact


def test_a_loaded_graph_is_the_one_that_was_imported(artifact: Artifact) -> None:
    loaded = load_artifact(artifact.path)
    assert loaded.network == (artifact.path / "graph.onnx").read_bytes()
    assert loaded.manifest["runtimes"] == ["onnxruntime"]
    assert loaded.state.by_name(loaded.state.initial())["h0"].tolist() == [[0.25] * 8] * 2
    assert loaded.state.by_name(loaded.state.initial())["c0"].tolist() == [[0.0] * 8] * 2
    assert loaded.differing_graphs == []
    assert loaded.manifest["training"]["imported"]["file"] == "torch_lstm.onnx"


def test_writing_the_graph_again_changes_nothing(artifact: Artifact) -> None:
    before = (artifact.path / "manifest.json").read_bytes()
    add_graph(artifact.path)
    assert (artifact.path / "manifest.json").read_bytes() == before


def with_onnx(artifact: Artifact, **changes: Any) -> Any:
    data = artifact.spec.model_dump(mode="json")
    data["onnx"].update(changes)
    return parse_spec(data)


def test_the_fingerprint_covers_graph_pairs_and_initial_values(artifact: Artifact) -> None:
    assert artifact.network is not None
    graph = onnx.load_from_string(artifact.network)
    graph.graph.node[0].name += "!"
    pairs = artifact.spec.model_dump(mode="json")["onnx"]["states"]
    swapped = [
        {**pair, "output": other["output"]} for pair, other in zip(pairs, pairs[::-1], strict=True)
    ]
    values = {"h0": np.full((2, 8), 0.5, np.float32)}
    found = {
        compute_fingerprint(artifact.spec, artifact.weights, artifact.network),
        compute_fingerprint(artifact.spec, artifact.weights, graph.SerializeToString()),
        compute_fingerprint(artifact.spec, values, artifact.network),
        compute_fingerprint(
            with_onnx(artifact, states=swapped), artifact.weights, artifact.network
        ),
    }
    assert len(found) == 4
    assert artifact.fingerprint in found


def test_batching_does_not_change_the_fingerprint(artifact: Artifact) -> None:
    spec = with_onnx(artifact, batching="step")
    assert compute_fingerprint(spec, artifact.weights, artifact.network) == artifact.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batching": "padded"}, r"expected one of \['cut', 'equal', 'step'\], got 'padded'"),
        ({"chunking": "per_chunk"}, r"expected one of \['equal'\], got 'cut'"),
        ({"outputs": [{"name": "y", "shape": [3], "has_time": False}]}, "expected 'step'"),
        ({"states": []}, "at least 1 item"),
    ],
)
def test_inconsistent_signatures_are_rejected(
    artifact: Artifact, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        with_onnx(artifact, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": 5}, "features: expected 4, the columns of the graph's inputs, got 5"),
        (
            {"layers": [{"kind": "lstm", "units": 2}]},
            r"expected a graph without \['layers'\]",
        ),
    ],
)
def test_a_graph_is_the_whole_network(
    artifact: Artifact, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec({**artifact.spec.model_dump(mode="json"), **changes})


def test_a_graph_and_its_signature_belong_together(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"`carry import MODEL\.onnx` packages both"):
        write_artifact(tmp_path / "out", artifact.spec, artifact.weights)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_graph_whose_work_depends_on_values_is_rejected_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """An artifact can be made by another version, or by another program."""
    plain(tmp_path / "good.onnx")
    spec = import_here(tmp_path / "good.onnx", tmp_path / "good", "m").artifact.spec
    plain(tmp_path / "bad.onnx", after=lambda g, rows: repeated(g, rows, excess(g)))
    graph, message = (tmp_path / "bad.onnx").read_bytes(), "graph.onnx: the operator Loop "
    with monkeypatch.context() as other_version:
        if not elsewhere:
            with pytest.raises(ArtifactError, match=message):
                write_artifact(tmp_path / "bad", spec, {}, network=graph)
            return
        other_version.setattr("models.onnx.bounded_work.find_unbounded_work", lambda *_: None)
        write_artifact(tmp_path / "bad", spec, {}, network=graph)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path / "bad")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"h0": np.zeros((2, 7), np.float32)}, r"weight 'h0': expected float32 \[2, 8\]"),
        ({"h0": np.zeros((2, 8))}, r"'h0': expected float32 \[2, 8\], got float64"),
        ({"other": np.zeros(2, np.float32)}, r"unknown \['other'\]"),
        ({"h0": np.full((2, 8), np.nan, np.float32)}, "'h0': expected finite values"),
    ],
)
def test_initial_values_fit_their_parts(
    artifact: Artifact, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        write_artifact(tmp_path / "out", artifact.spec, values, network=artifact.network)
