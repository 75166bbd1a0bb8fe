"""Measures what the manifest of a packaged model says of its data: burn-in and ranges.

Neither changes an output, and the fingerprint contains neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.errors import DataError
from models.training.burn_in import measure_burn_in, measure_rows_burn_in
from models.training.data import split_of, streams_of
from models.training.evaluate import run_chunks
from models.training.ranges import measure_ranges, measure_rows_ranges


def measure(
    artifact: Artifact,
    frame: pl.DataFrame,
    source: str = "data",
    scores: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure a trained model on the table of its training, without the events held out.

    Args:
        scores: the model's report or evaluation, if there is one, with its burn-in.

    Returns:
        `burn_in`, unless there is none, and `ranges`, as the manifest has them.
    """
    streams, split = streams_of(artifact.spec, frame, source), split_of(artifact.spec)
    burn_in = None if scores is None else scores.get("burn_in")
    if scores is None and artifact.spec.chunking != "whole":
        outputs = run_chunks(artifact, streams)
        burn_in = measure_burn_in(artifact, streams, outputs, split.test)
    return {
        **entry_of(burn_in),
        "ranges": measure_ranges(artifact, streams, split.validate, source).to_manifest(),
    }


def measure_rows(
    artifact: Artifact, frame: pl.DataFrame, stream: str, source: str = "data"
) -> dict[str, Any]:
    """Measure a model that takes rows.

    Args:
        frame: one row per event, in the order of the events of each stream: the stream's name and
            the F columns of a row of `inputs`.
        stream: column of the stream's name.

    Returns:
        `events`, `streams`, `burn_in`, unless there is none, with its curves, and `ranges`.

    Raises:
        DataError: the table has other columns, or a cell is not a finite number.
    """
    sequences = _rows_of_streams(frame, stream, artifact.spec.input_features, source)
    burn_in = measure_rows_burn_in(artifact, sequences)
    return {
        "events": frame.height,
        "streams": len(sequences),
        **({} if burn_in is None else {"burn_in": burn_in}),
        "ranges": measure_rows_ranges(artifact, sequences).to_manifest(),
    }


def entry_of(burn_in: dict[str, Any] | None) -> dict[str, Any]:
    """The entry of the manifest: a measured burn-in without its curves."""
    if burn_in is None:
        return {}
    return {"burn_in": {name: value for name, value in burn_in.items() if name != "curves"}}


def _rows_of_streams(
    frame: pl.DataFrame, stream: str, features: int, source: str
) -> list[NDArray[np.float32]]:
    columns = [name for name in frame.columns if name != stream]
    if len(columns) == len(frame.columns) or len(columns) != features:
        raise DataError(
            expected=f"{source}: a column {stream!r} with the names of streams, and {features} "
            "columns of numbers, those of a row",
            got=f"{frame.columns}",
        )
    numbers = frame.select(pl.col(columns).cast(pl.Float32, strict=False))
    rows = numbers.to_numpy()
    if not np.isfinite(rows).all():
        row, column = np.argwhere(~np.isfinite(rows))[0].tolist()
        raise DataError(
            field=columns[column],
            expected=f"{source}, row {row + 1}: a finite number",
            got=repr(frame[columns[column]][row]),
        )
    own = frame.with_row_index("_row").group_by(stream, maintain_order=True).agg("_row")["_row"]
    return [rows[each.to_numpy()] for each in own]
