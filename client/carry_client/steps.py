"""Events and rows as a request holds them, from lists, columns, DataFrames and arrays.

Absent values are left out: None, and in columns and DataFrames NaN and NaT too. A time without a
zone is rejected, since it would mean another moment elsewhere; NumPy's `datetime64` is UTC.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, Final, TypeGuard

import numpy as np

from carry_client.types import Encoding, Event, Events, FloatArray

Steps = list[dict[str, Any]] | FloatArray
"""T events as the wire has them, or T rows of encoded values, float32 [T, F]."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MILLISECOND: Final = timedelta(milliseconds=1)


def to_steps(events: Events) -> Steps:
    """Events or rows of any kind as the wire has them.

    Raises:
        ValueError: columns of different lengths, another array than [T, F], a time without zone.
        TypeError: neither events nor rows.
    """
    if isinstance(events, np.ndarray):
        if events.ndim != 2:
            raise ValueError(f"expected rows of shape [T, F], got shape {list(events.shape)}")
        return np.ascontiguousarray(events, np.float32)
    if isinstance(events, Mapping):
        return _from_columns(events)
    if hasattr(events, "to_dicts"):
        return [_to_wire(event, is_frame=True) for event in events.to_dicts()]
    if hasattr(events, "iloc") and hasattr(events, "columns"):
        frame: Any = events
        if not frame.columns.is_unique:
            raise ValueError(f"expected columns of different names, got {list(frame.columns)}")
        columns = {name: frame[name].tolist() for name in frame.columns}
        return _from_columns(columns)
    if isinstance(events, Sequence):
        return [_to_wire(event) for event in events]
    raise TypeError(
        "expected a list of events, a dict of columns, a DataFrame or an array [T, F], "
        f"got {type(events).__name__}"
    )


def body_member(steps: Steps, encoding: Encoding) -> dict[str, Any]:
    """The member of a body that holds them: `events` or `inputs`."""
    if isinstance(steps, list):
        return {"events": steps}
    if encoding == "msgpack":
        return {"inputs": steps.astype("<f4", copy=False).tobytes()}
    return {"inputs": steps.tolist()}


def is_sliceable(source: object) -> TypeGuard[Events]:
    """Whether a source has a length and any part of it can be read again."""
    if isinstance(source, Sequence):
        # a list of blocks has another length than its events
        return not source or isinstance(source[0], Mapping)
    is_frame = hasattr(source, "to_dicts") or hasattr(source, "iloc")
    return is_frame or isinstance(source, (np.ndarray, Mapping))


def length(events: Events) -> int:
    """T, the number of events."""
    if isinstance(events, Mapping):
        return next(iter(_lengths(events).values()), 0)
    return len(events)


def cut(events: Events, start: int, stop: int) -> Events:
    """Events start..stop-1, of the same kind."""
    if isinstance(events, Mapping):
        return {name: values[start:stop] for name, values in events.items()}
    anything: Any = events
    part: Events = (anything.iloc if hasattr(events, "iloc") else anything)[start:stop]
    return part


def sort_frame(frame: object, column: str) -> Events:
    """A DataFrame in the order of a column; rows with equal values keep theirs.

    Raises:
        TypeError: it is no DataFrame.
    """
    any_frame: Any = frame
    if hasattr(frame, "to_dicts"):
        polars: Events = any_frame.sort(column, maintain_order=True)
        return polars
    if hasattr(frame, "iloc"):
        pandas: Events = any_frame.sort_values(column, kind="stable")
        return pandas
    raise TypeError(f"expected a DataFrame to sort by {column!r}, got {type(frame).__name__}")


def _from_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    _lengths(columns)
    lists = [_to_list(values) for values in columns.values()]
    rows: Iterable[tuple[Any, ...]] = zip(*lists, strict=True)
    return [_to_wire(dict(zip(columns, row, strict=True)), is_frame=True) for row in rows]


def _lengths(columns: Mapping[str, Any]) -> dict[str, int]:
    """The lengths of columns, which are equal."""
    for name, values in columns.items():
        if not isinstance(name, str):
            raise TypeError(f"expected columns with the names of fields, got {name!r}")
        if not hasattr(values, "__len__") or isinstance(values, (str, bytes)):
            raise TypeError(
                f"{name}: expected a column, a list or array of values, got {values!r}; "
                "one event is sent as a list, [event]"
            )
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"expected columns of one length, got {lengths}")
    return lengths


def _to_list(values: Any) -> list[Any]:
    if not isinstance(values, np.ndarray):
        return list(values)
    if values.dtype.kind != "M":
        plain: list[Any] = values.tolist()
        return plain
    ms = values.astype("datetime64[ms]").astype(np.int64).tolist()
    return [None if absent else each for each, absent in zip(ms, np.isnat(values), strict=True)]


def _to_wire(event: Event, *, is_frame: bool = False) -> dict[str, Any]:
    if not isinstance(event, Mapping):
        raise TypeError(
            f"expected an event, a mapping of values by field, got {event!r}; "
            "rows of encoded values are sent as an array [T, F]"
        )
    wire = {}
    for name, value in event.items():
        if value is None or (is_frame and _is_missing(value)):
            continue
        if isinstance(value, np.generic):
            value = _to_list(np.asarray([value]))[0]
        if isinstance(value, datetime):
            value = _to_ms(name, value)
        wire[name] = value
    return wire


def _is_missing(value: object) -> bool:
    """Whether it is NaN, NaT or pandas' NA, none of which equals itself."""
    if isinstance(value, (str, bool, int)):
        return False
    is_equal: object = value == value
    return is_equal is not True and not (isinstance(is_equal, np.bool_) and bool(is_equal))


def _to_ms(name: str, time: datetime) -> int:
    """Epoch milliseconds; finer digits are cut off, to the past."""
    if time.tzinfo is None:
        raise ValueError(f"{name}: expected a time with a zone, got {time.isoformat()}")
    return (time - _EPOCH) // _MILLISECOND
