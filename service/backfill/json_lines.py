"""Parses lines of JSON into columns of text, and finds those that are no events."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
import polars as pl

from models.events.columns import BoolArray
from models.events.frame import InvalidRows

_LINES_AT_ONCE = 16_384
"""JSON that is parsed together: its tree is far larger than its text."""


def parse_lines(lines: pl.Series, names: Sequence[str]) -> tuple[pl.DataFrame, list[InvalidRows]]:
    """The members of objects as text, and the lines that are no objects of values."""
    dtype = pl.Struct(dict.fromkeys(names, pl.String))
    repeated = [lines.str.count_matches(f'"{name}"', literal=True) > 1 for name in names]
    suspicious = np.any([each.to_numpy() for each in repeated], axis=0)
    reasons: dict[int, tuple[str, str]] = {}
    try:
        objects = _decode(lines, dtype)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        suspicious = np.ones(len(lines), np.bool_)
    for row in np.flatnonzero(suspicious).tolist():
        if (reason := _reject_line(lines[row], names)) is not None:
            reasons[row] = reason
    if reasons or suspicious.all():
        wrong = np.zeros(len(lines), np.bool_)
        wrong[list(reasons)] = True
        kept = pl.select(pl.when(~pl.Series(wrong)).then(lines).otherwise(pl.lit("{}")))
        objects = _decode(kept.to_series(), dtype)
    frame = objects.struct.unnest() if len(lines) else pl.DataFrame(schema=dtype.to_schema())
    return frame, _by_expectation(len(lines), reasons)


def _decode(lines: pl.Series, dtype: pl.Struct) -> pl.Series:
    parts = range(0, max(1, len(lines)), _LINES_AT_ONCE)
    return pl.concat([lines[at : at + _LINES_AT_ONCE].str.json_decode(dtype) for at in parts])


def _by_expectation(rows: int, reasons: dict[int, tuple[str, str]]) -> list[InvalidRows]:
    invalid = []
    for expected in sorted({expected for expected, _ in reasons.values()}):
        wrong: BoolArray = np.zeros(rows, np.bool_)
        wrong[[row for row, reason in reasons.items() if reason[0] == expected]] = True
        invalid.append(InvalidRows("", wrong, expected, lambda row: reasons[row][1]))
    return invalid


def _reject_line(line: str, names: Sequence[str]) -> tuple[str, str] | None:
    """What was expected of a line and what it is instead; None if it is an object of values."""
    shown = repr(line[:100])
    try:
        # objects as tuples of their members, lists as lists
        row = json.loads(line, object_pairs_hook=tuple, parse_constant=_reject_constant)
    except (ValueError, RecursionError):
        return "a JSON object", shown
    if not isinstance(row, tuple):
        return "a JSON object", shown
    counts, members = Counter(name for name, _ in row), dict(row)
    for name in names:
        if counts[name] > 1:
            return "each member once", f"{name!r} {counts[name]} times"
        if isinstance(members.get(name), tuple | list):
            return f"one value as {name!r}", shown
    return None


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
