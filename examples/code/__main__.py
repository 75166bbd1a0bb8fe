"""`python -m examples.code`: train the example from scratch and compare it with n-grams.

Trains `spec.yaml` on 70% of the files of Python's standard library, chooses the epoch by 15%,
scores the others, and writes the artifact with report and plots to `build/examples/code` (or to the
path given). `python -m examples.code.comparison` compares it with trees and other seeds.
"""

from __future__ import annotations

import platform
from pathlib import Path

import polars as pl

from examples.code.data import read_sequences
from examples.command import BUILT, run_example

SPEC = Path(__file__).parent / "spec.yaml"


def tokens() -> pl.DataFrame:
    """The tokens of all files."""
    frame = read_sequences("code")
    print(f"{frame.height} tokens of the library of Python {platform.python_version()}")
    return frame


def main() -> None:
    """Train, score, write."""
    run_example("code", SPEC, tokens, BUILT / "code", description=__doc__, trees=False)


if __name__ == "__main__":
    main()
