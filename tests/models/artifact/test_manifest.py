"""Manifest: damaged and inconsistent files are rejected by name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.artifact.artifact import load_artifact
from models.artifact.fingerprint import canonical_json
from models.artifact.writing import write_artifact
from models.errors import ArtifactError
from models.spec.model import parse_spec
from tests.models.artifact.artifacts import WEIGHTS, check_rejection, manifest_of, seal
from tests.support.models import SMALL


def test_an_unfitted_spec_is_neither_written_nor_loaded(artifact_dir: Path, tmp_path: Path) -> None:
    data = json.loads(json.dumps(SMALL))
    data["events"]["fields"][0]["std"] = None
    spec = parse_spec(data)
    with pytest.raises(ArtifactError, match=r"fitted event schema.*\['load'\]"):
        write_artifact(tmp_path / "b", spec, WEIGHTS)

    manifest = manifest_of(artifact_dir)
    manifest["spec"] = spec.model_dump(mode="json")
    seal(artifact_dir, manifest)
    check_rejection(artifact_dir, "manifest.json", "fitted", "['load']")


def test_paths_without_an_artifact_are_rejected(artifact_dir: Path, tmp_path: Path) -> None:
    check_rejection(tmp_path / "none", "none", "expected a directory")
    check_rejection(artifact_dir / "report.json", "expected a directory")
    check_rejection(tmp_path, "manifest.json", "No such file")


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
def test_invalid_manifests_are_rejected(
    artifact_dir: Path, content: bytes, words: list[str]
) -> None:
    (artifact_dir / "manifest.json").write_bytes(content)

    check_rejection(artifact_dir, "manifest.json", *words)


def test_a_changed_manifest_fails_its_checksum(artifact_dir: Path) -> None:
    manifest = manifest_of(artifact_dir)
    manifest["metrics"]["auc"] = 0.99
    (artifact_dir / "manifest.json").write_text(json.dumps(manifest), "utf-8")

    check_rejection(
        artifact_dir, "manifest.json", "changed since it was written", manifest["checksum"]
    )


FILES = ["weights.safetensors", "graph.onnx", "report.json", "plots/skill.png"]


@pytest.mark.parametrize("name", FILES)
def test_every_listed_file_is_verified(artifact_dir: Path, name: str) -> None:
    file = artifact_dir / name
    content = file.read_bytes()

    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    check_rejection(artifact_dir, name, "SHA-256")
    file.write_bytes(content + b"x")
    check_rejection(artifact_dir, name, f"expected {len(content)} bytes, got {len(content) + 1}")
    file.unlink()
    check_rejection(artifact_dir, name, "No such file")


Edit = Callable[[dict[str, Any]], None]

EDITS: dict[str, tuple[Edit, list[str]]] = {
    "no spec": (lambda m: m.pop("spec"), ["spec"]),
    "wrong spec": (lambda m: m["spec"].update(layers=[]), ["layers"]),
    "no files": (lambda m: m.pop("files"), ["`files`"]),
    "bad entry": (lambda m: m["files"].update({"report.json": 1}), ["files.report.json"]),
    "no weights": (lambda m: m.pop("weights"), ["`weights`", "None"]),
    "unlisted graph": (lambda m: m.update(graph="g"), ["`graph`", "'g'"]),
    "graph no name": (lambda m: m.update(graph=["graph.onnx"]), ["`graph`", "['graph.onnx']"]),
    "weights no name": (lambda m: m.update(weights=["w"]), ["`weights`", "['w']"]),
    "metrics": (lambda m: m.update(metrics=[1]), ["`metrics`", "an object"]),
    "training": (lambda m: m.update(training="x"), ["`training`", "an object"]),
    "no size": (lambda m: m["files"].update(x={"sha256": ""}), ["files.x", "size_bytes"]),
    "large": (
        lambda m: m["files"].update(x={"sha256": "", "size_bytes": 2**32}),
        ["at most 4294967296 bytes in all"],
    ),
    "NUL in a name": (
        lambda m: m["files"].update({"a\0b": {"sha256": "", "size_bytes": 0}}),
        ["inside the artifact"],
    ),
    "unlisted weights": (lambda m: m.update(weights="w"), ["`weights`", "'w'"]),
    "name": (lambda m: m.update(name="other"), ["`name`", "small", "other"]),
    "state": (
        lambda m: m["state"].pop("gru_1.hidden"),
        ["`state`", "of another version of Carry: train or import it again"],
    ),
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
def test_an_inconsistent_manifest_is_rejected(
    artifact_dir: Path, edit: Edit, words: list[str]
) -> None:
    manifest = manifest_of(artifact_dir)
    edit(manifest)
    seal(artifact_dir, manifest)

    check_rejection(artifact_dir, "manifest.json", *words)


def test_a_symlink_out_of_the_directory_is_not_followed(artifact_dir: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_bytes((artifact_dir / "report.json").read_bytes())
    (artifact_dir / "report.json").unlink()
    (artifact_dir / "report.json").symlink_to(outside)

    check_rejection(artifact_dir, "inside the artifact", "report.json")


def test_symlinks_to_and_inside_the_directory_are_followed(
    artifact_dir: Path, tmp_path: Path
) -> None:
    (artifact_dir / "report.json").rename(artifact_dir / "kept.json")
    (artifact_dir / "report.json").symlink_to("kept.json")
    (tmp_path / "link").symlink_to(artifact_dir)

    assert load_artifact(tmp_path / "link").path == tmp_path / "link"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "report.json"])
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (fifo, "regular file"),
        (Path.mkdir, "regular file"),
        (device, "inside the artifact"),
        (loop, "symbolic links"),
        (sparse, str(2**40)),
    ],
    ids=["fifo", "folder", "device", "loop", "sparse"],
)
def test_irregular_files_are_rejected_before_they_are_read(
    artifact_dir: Path, name: str, make: Callable[[Path], None], word: str
) -> None:
    (artifact_dir / name).unlink()
    make(artifact_dir / name)

    check_rejection(artifact_dir, name, word)


def test_an_oversized_manifest_is_rejected_before_it_is_read(artifact_dir: Path) -> None:
    (artifact_dir / "manifest.json").write_bytes(b" " * (16 * 2**20 + 1))

    check_rejection(artifact_dir, "manifest.json", "at most 16777216 bytes, got 16777217")


def test_a_file_is_opened_once(artifact_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loaded bytes are the verified ones: no path is opened twice."""
    opened: list[str] = []
    real = os.open

    def counted(path: str, *rest: int, **more: int) -> int:
        opened.append(Path(path).name)
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", counted)
    load_artifact(artifact_dir)

    assert sorted(opened) == sorted(["manifest.json", *(Path(n).name for n in FILES)])


def test_the_checksum_covers_the_canonical_manifest(artifact_dir: Path) -> None:
    manifest = manifest_of(artifact_dir)
    checksum = manifest.pop("checksum")

    assert checksum == hashlib.sha256(canonical_json(manifest)).hexdigest()
