"""Artifacts: what is written is read back, and whatever is wrong is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from models.artifact import Artifact, add_graph, load_artifact, write_artifact
from models.errors import ArtifactError, GraphUnsupportedError
from models.fingerprint import canonical_json, fingerprint
from models.layout import output_spec, state_spec
from models.spec import parse_spec
from tests.support.models import SMALL, random_weights, small_spec

SPEC = small_spec()
WEIGHTS = random_weights(SPEC)
METRICS = {"auc": 0.75, "by_month": [0.5, None, True]}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A good artifact."""
    path = tmp_path / "models" / "small"
    write_artifact(
        path,
        SPEC,
        WEIGHTS,
        metrics=METRICS,
        training={"epochs": 3},
        files={"report.json": b"{}", "plots/skill.png": b"\x89PNG"},
    )
    return path


def manifest_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "manifest.json").read_text("utf-8"))
    return found


def seal(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest whose checksum and file hashes are right."""
    for name in manifest.get("files", {}):
        file = path / name
        if file.is_file() and isinstance(manifest["files"][name], dict):
            data = file.read_bytes()
            manifest["files"][name] = {
                "sha256": hashlib.sha256(data).hexdigest(),
                "size_bytes": len(data),
            }
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    manifest["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def refusal(path: Path, *words: str) -> None:
    """Loading is refused, with all these words in the message."""
    with pytest.raises(ArtifactError) as caught:
        load_artifact(path)
    for word in words:
        assert word in str(caught.value), caught.value


def test_what_is_written_is_read_back(made: Path) -> None:
    artifact = load_artifact(made)

    assert artifact.path == made
    assert artifact.spec == SPEC
    assert artifact.fingerprint == fingerprint(SPEC, WEIGHTS)
    assert artifact.version == artifact.fingerprint.hex()[:12]
    assert artifact.state == state_spec(SPEC)
    assert artifact.outputs == output_spec(SPEC)
    assert artifact.manifest["metrics"] == METRICS
    assert artifact.manifest["training"] == {"epochs": 3}
    assert artifact.weights.keys() == WEIGHTS.keys()
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(artifact.weights[name], array)
        with pytest.raises(ValueError, match="read-only"):
            artifact.weights[name][...] = 0


def test_writing_gives_what_loading_gives(tmp_path: Path) -> None:
    written = write_artifact(tmp_path / "a", SPEC, WEIGHTS)
    loaded = load_artifact(tmp_path / "a")

    assert isinstance(written, Artifact)
    assert (written.path, written.fingerprint) == (loaded.path, loaded.fingerprint)
    assert written.manifest == loaded.manifest
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_the_manifest_says_what_follows_from_the_spec(made: Path) -> None:
    manifest = manifest_of(made)

    assert manifest["format"] == 1
    assert manifest["name"] == "small"
    assert manifest["input_features"] == 13
    assert manifest["state"]["lstm_1.carry"] == {"shape": [3], "dtype": "float32"}
    assert manifest["state"]["clock.last_ms"] == {"shape": [], "dtype": "int64"}
    assert manifest["outputs"]["range"] == {
        "shape": [2, 3],
        "labels": ["0.1", "0.5", "0.9"],
        "per": "step",
    }
    assert set(manifest["files"]) == {
        "graph.onnx",
        "weights.safetensors",
        "report.json",
        "plots/skill.png",
    }
    assert (manifest["graph"], manifest["runtimes"]) == (
        "graph.onnx",
        ["onnxruntime", "tensorflow"],
    )
    assert manifest["libraries"]["numpy"] == np.__version__


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_artifact(tmp_path / name, SPEC, dict(reversed(WEIGHTS.items())))

    for file in ("manifest.json", "weights.safetensors", "graph.onnx"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_weights_in_another_memory_order_are_stored_as_they_are(tmp_path: Path) -> None:
    turned = {name: np.asfortranarray(array) for name, array in WEIGHTS.items()}

    artifact = write_artifact(tmp_path / "a", SPEC, turned)

    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(artifact.weights[name], array)


def test_files_are_copied_from_paths_too(tmp_path: Path) -> None:
    source = tmp_path / "source.txt"
    source.write_text("skill")

    artifact = write_artifact(tmp_path / "a", SPEC, WEIGHTS, files={"x/report.txt": source})

    assert (artifact.path / "x" / "report.txt").read_text() == "skill"


def test_a_raw_model_needs_no_events(tmp_path: Path) -> None:
    spec = parse_spec(
        {
            "name": "raw",
            "features": 2,
            "layers": [{"kind": "lstm", "units": 2}],
            "heads": [{"kind": "sequence", "name": "h"}],
        }
    )
    artifact = write_artifact(tmp_path / "raw", spec, random_weights(spec))

    assert artifact.state.int_size == 0
    assert load_artifact(tmp_path / "raw").spec == spec


def test_unlisted_files_and_moves_change_nothing(made: Path, tmp_path: Path) -> None:
    (made / "notes.txt").write_text("mine")
    moved = tmp_path / "elsewhere"
    shutil.move(made, moved)

    assert load_artifact(moved).spec == SPEC


def test_an_artifact_is_replaced_only_on_request(made: Path) -> None:
    other = random_weights(SPEC, seed=8)

    with pytest.raises(ArtifactError, match="holds an artifact already"):
        write_artifact(made, SPEC, other)
    assert load_artifact(made).fingerprint == fingerprint(SPEC, WEIGHTS)

    write_artifact(made, SPEC, other, overwrite=True)
    assert load_artifact(made).fingerprint == fingerprint(SPEC, other)
    assert [entry.name for entry in made.parent.iterdir()] == ["small"]
    assert not (made / "report.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_artifact_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "precious.txt").write_text("x")
    file.write_text("x")

    for path in (folder, file):
        with pytest.raises(ArtifactError, match="no artifact"):
            write_artifact(path, SPEC, WEIGHTS, overwrite=overwrite)
    assert (folder / "precious.txt").exists()


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    assert write_artifact(tmp_path / "a", SPEC, WEIGHTS).spec == SPEC


def test_a_write_that_fails_leaves_what_was_there(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_artifact(made, SPEC, random_weights(SPEC, seed=8), overwrite=True)

    monkeypatch.undo()
    assert load_artifact(made).fingerprint == fingerprint(SPEC, WEIGHTS)
    assert [entry.name for entry in made.parent.iterdir()] == ["small"]


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/x",
        "a/../../x",
        "",
        ".",
        "a//b",
        "./a",
        "a\\b",
        "manifest.json",
        "weights.safetensors",
        "graph.onnx",
    ],
)
def test_file_names_that_lead_out_or_are_taken_are_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="file name"):
        write_artifact(tmp_path / "a", SPEC, WEIGHTS, files={name: b""})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad", [{"x": float("nan")}, {"x": np.float32(1)}, {"x": object()}, {"x": float("inf")}]
)
def test_metrics_are_plain_finite_data(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="plain, finite JSON"):
        write_artifact(tmp_path / "a", SPEC, WEIGHTS, metrics=bad)


def without(name: str) -> dict[str, Any]:
    return {key: array for key, array in WEIGHTS.items() if key != name}


def nan_in(name: str) -> Any:
    array = WEIGHTS[name].copy()
    array.flat[-1] = np.nan
    return array


MISFITS = {
    "missing": (without("gru_1.bias"), "missing ['gru_1.bias'], unknown []"),
    "unknown": ({**WEIGHTS, "x": np.zeros(1, np.float32)}, "missing [], unknown ['x']"),
    "shape": (
        {**WEIGHTS, "lstm_1.bias": np.zeros(13, np.float32)},
        "weight 'lstm_1.bias': expected float32 [12], got float32 [13]",
    ),
    "transposed": (
        {**WEIGHTS, "dense_1.kernel": np.ascontiguousarray(WEIGHTS["dense_1.kernel"].T)},
        "weight 'dense_1.kernel': expected float32 [7, 5], got float32 [5, 7]",
    ),
    "dtype": (
        {**WEIGHTS, "lstm_1.bias": np.zeros(12)},
        "weight 'lstm_1.bias': expected float32 [12], got float64 [12]",
    ),
    "nan": (
        {**WEIGHTS, "gru_1.kernel": nan_in("gru_1.kernel")},
        "weight 'gru_1.kernel': expected finite",
    ),
}


@pytest.mark.parametrize(("weights", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_weights_that_do_not_fit_are_neither_written_nor_loaded(
    made: Path, tmp_path: Path, weights: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError) as caught:
        write_artifact(tmp_path / "b", SPEC, weights)
    assert message in str(caught.value)
    assert not (tmp_path / "b").exists()

    (made / "weights.safetensors").write_bytes(safetensors.numpy.save(weights))
    seal(made, manifest_of(made))
    refusal(made, "weights.safetensors", message)


def test_a_spec_that_is_not_fitted_is_neither_written_nor_loaded(
    made: Path, tmp_path: Path
) -> None:
    data = json.loads(json.dumps(SMALL))
    data["events"]["fields"][0]["std"] = None
    spec = parse_spec(data)
    with pytest.raises(ArtifactError, match=r"fitted event schema.*\['load'\]"):
        write_artifact(tmp_path / "b", spec, WEIGHTS)

    manifest = manifest_of(made)
    manifest["spec"] = spec.model_dump(mode="json")
    seal(made, manifest)
    refusal(made, "manifest.json", "fitted", "['load']")


def test_paths_that_are_no_artifact(made: Path, tmp_path: Path) -> None:
    refusal(tmp_path / "none", "none", "expected a directory")
    refusal(made / "report.json", "expected a directory")
    refusal(tmp_path, "manifest.json", "No such file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["expected JSON"]),
        (b"{", ["expected JSON"]),
        (b"\xff\xfe", ["expected JSON"]),
        (b"[" * 100_000, ["expected JSON"]),
        (b"[]", ["expected a JSON object, got list"]),
        (b"{}", ["expected artifact format 1, got None"]),
        (b'{"format": 2}', ["expected artifact format 1, got 2"]),
        (b'{"format": "1"}', ["expected artifact format 1, got '1'"]),
        (b'{"format": true}', ["expected artifact format 1, got True"]),
        (b'{"format": 1}', ["checksum"]),
        (b'{"format": 1, "x": NaN}', ["finite"]),
    ],
)
def test_manifests_that_are_none(made: Path, content: bytes, words: list[str]) -> None:
    (made / "manifest.json").write_bytes(content)

    refusal(made, "manifest.json", *words)


def test_a_changed_manifest_fails_its_checksum(made: Path) -> None:
    manifest = manifest_of(made)
    manifest["metrics"]["auc"] = 0.99
    (made / "manifest.json").write_text(json.dumps(manifest), "utf-8")

    refusal(made, "manifest.json", "changed since it was written", manifest["checksum"])


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "graph.onnx", "report.json", "plots/skill.png"]
)
def test_every_listed_file_is_guarded(made: Path, name: str) -> None:
    file = made / name
    content = file.read_bytes()

    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refusal(made, name, "SHA-256")
    file.write_bytes(content + b"x")
    refusal(made, name, f"expected {len(content)} bytes, got {len(content) + 1}")
    file.unlink()
    refusal(made, name, "No such file")


Edit = Callable[[dict[str, Any]], None]

EDITS: dict[str, tuple[Edit, list[str]]] = {
    "no spec": (lambda m: m.pop("spec"), ["spec"]),
    "wrong spec": (lambda m: m["spec"].update(layers=[]), ["layers"]),
    "no files": (lambda m: m.pop("files"), ["`files`"]),
    "bad entry": (lambda m: m["files"].update({"report.json": 1}), ["files.report.json"]),
    "no weights": (lambda m: m.pop("weights"), ["`weights`", "None"]),
    "unlisted graph": (lambda m: m.update(graph="g"), ["`graph`", "'g'"]),
    "unlisted weights": (lambda m: m.update(weights="w"), ["`weights`", "'w'"]),
    "name": (lambda m: m.update(name="other"), ["`name`", "small", "other"]),
    "state": (lambda m: m["state"].pop("gru_1.hidden"), ["`state`"]),
    "state shape": (lambda m: m["state"]["lstm_1.carry"].update(shape=[4]), ["`state`"]),
    "outputs": (lambda m: m["outputs"]["next"].update(shape=[2]), ["`outputs`"]),
    "features": (lambda m: m.update(input_features=14), ["`input_features`", "13", "14"]),
    "fingerprint": (lambda m: m.update(fingerprint="00" * 16), ["`fingerprint`", "00" * 16]),
    "version": (lambda m: m.update(version="1.0"), ["`version`", "1.0"]),
    "changed number": (
        lambda m: m["spec"]["events"]["fields"][0].update(mean=3.8),
        ["`fingerprint`"],
    ),
    "out by dots": (
        lambda m: m["files"].update({"../x": {"sha256": "", "size_bytes": 0}}),
        ["inside the artifact", "'../x'"],
    ),
    "out by root": (
        lambda m: m["files"].update({"/etc/hostname": {"sha256": "", "size_bytes": 0}}),
        ["inside the artifact"],
    ),
}


@pytest.mark.parametrize(("edit", "words"), EDITS.values(), ids=EDITS.keys())
def test_a_manifest_that_does_not_fit_itself(made: Path, edit: Edit, words: list[str]) -> None:
    manifest = manifest_of(made)
    edit(manifest)
    seal(made, manifest)

    refusal(made, "manifest.json", *words)


def test_a_link_out_of_the_directory_is_not_followed(made: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_bytes((made / "report.json").read_bytes())
    (made / "report.json").unlink()
    (made / "report.json").symlink_to(outside)

    refusal(made, "inside the artifact", "report.json")


def test_weights_that_are_no_safetensors(made: Path) -> None:
    for content in (b"", b"\x08\0\0\0\0\0\0\0{}", b"\xff" * 64):
        (made / "weights.safetensors").write_bytes(content)
        seal(made, manifest_of(made))
        refusal(made, "weights.safetensors")


def test_weights_are_pinned_by_the_fingerprint(made: Path) -> None:
    swapped = {
        **WEIGHTS,
        "lstm_1.kernel": WEIGHTS["gru_1.kernel"],
        "gru_1.kernel": WEIGHTS["lstm_1.kernel"],
    }
    (made / "weights.safetensors").write_bytes(safetensors.numpy.save(swapped))
    seal(made, manifest_of(made))

    refusal(made, "`fingerprint`")


def test_the_checksum_is_that_of_the_canonical_manifest(made: Path) -> None:
    manifest = manifest_of(made)
    checksum = manifest.pop("checksum")

    assert checksum == hashlib.sha256(canonical_json(manifest)).hexdigest()


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
