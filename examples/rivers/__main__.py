"""`python -m examples.rivers`: train the example from scratch and score it.

Trains `spec.yaml`, a stacked LSTM, on generated catchments, and scores it on held-out ones beside
the same network without its memory (the state is reset every 100 events) and the base rate. Writes
the artifact to `models/pretrained/rivers` (or to the path given), and the table beside it as
`held-out.md`. `python -m examples.rivers.comparison` compares it with other methods.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from examples.command import run_example
from examples.rivers.comparison import base_rate, lstm_rows, table
from examples.rivers.data import rivers
from examples.rivers.networks import SPEC
from models.artifact.artifact import Artifact

OUT = Path(__file__).parents[2] / "pretrained" / "rivers"


def main() -> None:
    """Train, score, write."""
    run_example(
        "rivers",
        SPEC,
        lambda: rivers("train"),
        OUT,
        description=__doc__,
        further_files=_comparison_file,
        trees=False,
    )


def _comparison_file(artifact: Artifact, frame: pl.DataFrame) -> dict[str, bytes]:
    held_out = rivers("held_out")
    rows = [*lstm_rows(artifact, held_out), base_rate(frame, held_out)]
    return {"held-out.md": table(rows).encode()}


if __name__ == "__main__":
    main()
