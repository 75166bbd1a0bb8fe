"""ONNX Runtime's telemetry is off in every process of the project that loads the library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.models import PRETRAINED

REPOSITORY = Path(__file__).resolve().parents[2]
SWITCHES = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI", "XDG_CACHE_HOME")
"""Variables that turn telemetry off by themselves, or move its files."""

LOAD = """
import sys
from pathlib import Path
from models.artifact.artifact import load_artifact
from service.engine.runtimes.onnx import OnnxRuntime
OnnxRuntime(load_artifact(Path(sys.argv[1]))).warm()
"""


def test_a_loaded_model_leaves_no_telemetry_files(tmp_path: Path) -> None:
    """With telemetry the library keeps a database and an identifier below the home directory."""
    kept = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    artifact = PRETRAINED / "flights"
    subprocess.run(
        [sys.executable, "-c", LOAD, str(artifact)],
        cwd=REPOSITORY,
        env={**kept, "HOME": str(tmp_path)},
        check=True,
    )
    assert list(tmp_path.rglob("*")) == []
