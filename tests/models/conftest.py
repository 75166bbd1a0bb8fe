"""The artifact that the tests damage and rewrite."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.artifact.writing import write_artifact
from tests.models.artifact.artifacts import METRICS, SPEC, WEIGHTS


@pytest.fixture
def artifact_dir(tmp_path: Path) -> Path:
    """A valid artifact."""
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
