"""Reads the labels of events: values of the event itself that it does not carry.

Each (`models.spec.heads.LabelHead`) becomes a number: the index of its class, or 1 and 0 if there
are no classes; NaN if the cell is empty.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.errors import DataError
from models.events.parse import TRUTH
from models.spec.heads import LabelHead
from models.spec.model import ModelSpec

Labels = Mapping[str, NDArray[np.float32]]
"""Head name -> float32 [rows]."""


def labels_of(
    spec: ModelSpec,
    frame: pl.DataFrame,
    source: str = "data",
    rows: NDArray[np.int64] | None = None,
) -> Labels:
    """Read the column of every label head.

    Args:
        spec: the model.
        frame: one row per event; the labels are in its order.
        source: what errors call the table.
        rows: int64, index of each row in the table, for errors; by default the frame is the
            table.

    Raises:
        DataError: a column is not there, or a cell is neither empty nor a class of its head
            (true, false, 1 or 0 if it has no classes).
    """
    heads = [head for head in spec.heads if isinstance(head, LabelHead)]
    return {head.name: _column(head, frame, source, rows) for head in heads}


def _column(
    head: LabelHead, frame: pl.DataFrame, source: str, rows: NDArray[np.int64] | None
) -> NDArray[np.float32]:
    if head.source not in frame.columns:
        raise DataError(
            field=head.source,
            expected=f"{source}: a column of the labels of {head.name!r}",
            got=f"{frame.columns}",
        )
    if head.classes:
        codes = {name: float(at) for at, name in enumerate(head.classes)}
        return _codes(frame[head.source].cast(pl.String), codes, source, rows)
    return read_truth(frame[head.source], source, rows)


def read_truth(
    column: pl.Series, source: str = "data", rows: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """Read a column of true and false as 1 and 0, also if it is text; NaN where a cell is empty.

    Args:
        source, rows: as in `labels_of`.

    Raises:
        DataError: a cell is neither empty nor true, false, 1 or 0.
    """
    text = column.cast(pl.String).str.strip_chars().str.to_lowercase()
    return _codes(text, {name: float(is_true) for name, is_true in TRUTH.items()}, source, rows)


def _codes(
    text: pl.Series, codes: Mapping[str, float], source: str, rows: NDArray[np.int64] | None
) -> NDArray[np.float32]:
    labels = text.replace_strict(codes, default=None, return_dtype=pl.Float32)
    invalid = text.is_not_null() & labels.is_null()
    if invalid.any():
        at = invalid.arg_true().to_numpy()
        numbers = at if rows is None else rows[at]
        first = int(np.argmin(numbers))
        raise DataError(
            field=text.name,
            expected=f"{source}, row {numbers[first] + 1}: one of {list(codes)}, or nothing",
            got=repr(text[int(at[first])]),
        )
    return labels.fill_null(float("nan")).to_numpy().astype(np.float32)
