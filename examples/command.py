"""The commands of the examples: train from scratch, compare with baselines, show the report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import polars as pl

from models.artifact.artifact import Artifact
from models.artifact.files import replace_file
from models.errors import ModelsError
from models.spec.spec_file import read_spec
from models.training.train_frame import REPORT, train_frame

if TYPE_CHECKING:
    from models.training.report import Further

FurtherFiles = Callable[[Artifact, pl.DataFrame], dict[str, bytes]]
BUILT = Path("build/examples")
"""Directory of the examples' artifacts, relative to the working directory."""


def run_example(
    name: str,
    spec: Path,
    events: Callable[[], pl.DataFrame],
    out: Path,
    *,
    description: str | None = None,
    further: Further | None = None,
    further_files: FurtherFiles | None = None,
    trees: bool = True,
) -> None:
    """Read the command line and run one example.

    Args:
        name: the example's module under `examples`.
        spec: its specification.
        events: prepares its table.
        out: the artifact's directory, unless a path is given.
        description: of the command.
        further: baselines that only these data allow, see `make_report`.
        trees: compare with boosted trees too.
        further_files: makes further files of the artifact's folder; those in `.md` are printed.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", nargs="?", type=Path, default=out, help=f"default: {out}")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted training")
    parser.add_argument("--show", action="store_true", help="print the report that is there")
    options = parser.parse_args()
    if options.show:
        from models.training.report import report_lines

        report = options.out / REPORT
        if report.exists():
            print("\n".join(report_lines(orjson.loads(report.read_bytes()))))
        for text in sorted(options.out.glob("*.md")):
            print(text.read_text(encoding="utf-8"))
        return
    start = time.monotonic()
    try:
        frame = events()
        artifact = train_frame(
            read_spec(spec),
            frame,
            options.out,
            resume=options.resume,
            overwrite=True,
            source=name,
            trees=trees,
            further=further,
        )
        if further_files is not None:
            for file, content in further_files(artifact, frame).items():
                replace_file(options.out / file, content)
                if file.endswith(".md"):
                    print(content.decode())
    except ModelsError as error:
        raise SystemExit(f"{name}: {error}") from error
    print(
        f"{options.out}: model {artifact.spec.name}, version {artifact.version}, "
        f"after {time.monotonic() - start:.0f} s"
    )
