"""Artifact of the tests, and ways to damage it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from models.artifact.artifact import load_artifact
from models.errors import ArtifactError
from tests.support.models import random_weights, small_spec

SPEC = small_spec()
WEIGHTS = random_weights(SPEC)
METRICS = {"auc": 0.75, "by_month": [0.5, None, True]}


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


def check_rejection(path: Path, *words: str) -> None:
    """Check that loading is rejected, with all these words in the message."""
    with pytest.raises(ArtifactError) as caught:
        load_artifact(path)
    for word in words:
        assert word in str(caught.value), caught.value
