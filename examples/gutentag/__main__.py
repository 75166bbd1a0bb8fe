"""`python -m examples.gutentag`: compare detection on the series of another generator.

GutenTAG (Wenig, Schmidl and Papenbrock, VLDB 2022) generates 40 series with development kinds of
anomalies and 40 with held-out kinds, see `generate.py`. It needs older packages than Carry, so
it is installed into an environment of its own, `build/gutentag`. The model is trained on
the first 40 days without a label, detection and all baselines are fitted to the next 20, and the
last 40 are scored. Writes the artifact to `build/examples/gutentag` (or to the path given), and
the comparison beside it as `detection.md`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import polars as pl

from examples.command import BUILT, run_example
from examples.detection import comparison
from models.artifact.artifact import Artifact
from models.spec.model import schema_of
from models.spec.spec_file import read_spec
from models.training.files import read_data

HERE = Path(__file__).parent
SPEC = HERE / "spec.yaml"
ENVIRONMENT = Path("build/gutentag")
# with these versions the series are always the same
PACKAGES = (
    "timeeval-GutenTAG==1.5.0",
    "neurokit2==0.1.2",
    "numpy==2.2.6",
    "pandas==2.3.3",
    "scipy==1.14.1",
)


def main() -> None:
    """Generate, train, compare, write."""
    run_example(
        "gutentag",
        SPEC,
        lambda: generate_once("development"),
        BUILT / "gutentag",
        description=__doc__,
        further_files=_comparison_file,
        trees=False,
    )


def generate_once(kinds: str) -> pl.DataFrame:
    """The series of one set of kinds, generated at the first call."""
    path = ENVIRONMENT / f"{kinds}.csv"
    if not path.exists():
        python = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / "python"
        if not python.exists():
            venv.create(ENVIRONMENT, with_pip=True)
        _run(python, "-m", "pip", "install", "--quiet", *PACKAGES)
        unfinished = path.with_suffix(".unfinished")
        _run(python, HERE / "generate.py", kinds, unfinished)
        unfinished.replace(path)
    return read_data(path, schema_of(read_spec(SPEC)))


def _run(*command: str | Path) -> None:
    print(" ".join(map(str, command)), file=sys.stderr)
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603


def _comparison_file(artifact: Artifact, frame: pl.DataFrame) -> dict[str, bytes]:
    tables = {"development": frame, "held out": generate_once("held_out")}
    return {"detection.md": comparison(artifact, tables).encode()}


if __name__ == "__main__":
    main()
