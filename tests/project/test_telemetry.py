"""ONNX Runtime's telemetry is off in every process of the project that loads the library."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import models

REPOSITORY = Path(__file__).resolve().parents[2]
GATE = REPOSITORY / "models" / "onnx" / "library.py"
SWITCHES = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI", "XDG_CACHE_HOME")
"""Variables that turn telemetry off by themselves, or move its files."""

LOAD = """
import sys
from pathlib import Path
from models.artifact.artifact import load_artifact
from service.engine.runtimes.onnx import OnnxRuntime
OnnxRuntime(load_artifact(Path(sys.argv[1]))).warm()
"""


def imports(path: Path) -> Iterator[str]:
    """The top-level packages that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_one_module_imports_onnxruntime() -> None:
    sources = [
        path
        for folder in ("models", "service", "tests", "examples")
        for path in (REPOSITORY / folder).rglob("*.py")
    ]
    naming = [path for path in sources if "onnxruntime" in path.read_text(encoding="utf-8")]
    assert [path for path in naming if "onnxruntime" in imports(path)] == [GATE]


def test_a_loaded_model_leaves_no_telemetry_files(tmp_path: Path) -> None:
    """With telemetry the library keeps a database and an identifier below the home directory."""
    kept = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    artifact = Path(models.__file__).parent / "pretrained" / "flights"
    subprocess.run(
        [sys.executable, "-c", LOAD, str(artifact)],
        cwd=REPOSITORY,
        env={**kept, "HOME": str(tmp_path)},
        check=True,
    )
    assert list(tmp_path.rglob("*")) == []
