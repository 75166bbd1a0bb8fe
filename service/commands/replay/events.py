"""The events to replay: a table cut into streams, each in the order of its time.

Events are read under the model's own schema (`models.events.frame`), so that what is sent is
exactly the schema's fields and what is verified afterwards are the same values. A stream's
events are ordered by the timestamp field; ties, and schemas without one, by the order of the rows.

It rejects a file that cannot be read, a missing or duplicate column, values that the schema
rejects, and stream names that the service does not accept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from carry_client import ModelDescription
from models.errors import DataError, ModelsError
from models.events.columns import EventColumns
from models.events.frame import columns_from_frame
from models.events.schema import EventSchema
from models.training.files import check_duplicate_names
from service.commands.replay.departures import By, flight_events
from service.core.values import STREAM_NAME_RULE, is_stream_name

IntArray = NDArray[np.int64]


class ReplayError(Exception):
    """The replay cannot continue; the message is one sentence for the person who started it."""


@dataclass(frozen=True, slots=True)
class StreamEvents:
    """One stream's events.

    Attributes:
        name: the stream's name in requests, prefix included.
        columns: its T events in order.
        times_ms: int64 [T], epoch milliseconds; None if the schema has no timestamp.
    """

    name: str
    columns: EventColumns
    times_ms: IntArray | None

    def __len__(self) -> int:
        return self.columns.steps

    def time_ms(self, index: int) -> int:
        """The timestamp of an event, epoch milliseconds; 0 without timestamps."""
        return 0 if self.times_ms is None else int(self.times_ms[index])

    def events(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Events start..stop-1 as a request has them: timestamps as epoch milliseconds, without
        absent values."""
        events = self.columns[start:stop]
        names = list(events.values)
        columns = []
        for name in names:
            values = events.values[name].tolist()
            present = events.present[name].tolist()
            columns.append([v if has else None for v, has in zip(values, present, strict=True)])
        return [
            {name: value for name, value in zip(names, row, strict=True) if value is not None}
            for row in zip(*columns, strict=True)
        ]


def event_schema(model: ModelDescription) -> EventSchema:
    """The event schema in the model's description: not fitted, which is enough to send events.

    Raises:
        ReplayError: the model takes no events.
    """
    if model.fields is None:
        raise ReplayError(f"model {model.name!r} takes no events, only `inputs`: nothing to replay")
    fields = [
        {"name": field.name, "kind": field.kind, "optional": field.is_optional}
        for field in model.fields
    ]
    return EventSchema.model_validate({"fields": fields})


def load_streams(
    schema: EventSchema,
    data: Path | None = None,
    *,
    by: By = "airport-carrier",
    stream: str = "stream",
    limit: int | None = None,
    prefix: str = "",
) -> list[StreamEvents]:
    """The streams to replay, in the order of their first events.

    Args:
        schema: the model's events.
        data: a CSV, JSON Lines or Parquet file; None for the departures from New York.
        by: which departures form one stream.
        stream: the column of `data` that names the stream.
        limit, prefix: as for `split_streams`.

    Raises:
        ReplayError: one of the reasons in the module's docstring.
    """
    frame = _read_frame(data, by)
    stream = "stream" if data is None else stream
    if stream not in frame.columns:
        raise ReplayError(f"--stream-column: expected one of {frame.columns}, got {stream!r}")
    try:
        columns = columns_from_frame(schema, frame)
    except DataError as error:
        raise ReplayError(f"the data do not fit the model's events: {error}") from error
    names = frame[stream].cast(pl.String)
    if names.null_count():
        row = int(np.argmax(names.is_null().to_numpy()))
        raise ReplayError(f"row {row}: expected a stream's name in {stream!r}, got none")
    return split_streams(schema, columns, names.to_list(), limit, prefix)


def split_streams(
    schema: EventSchema,
    columns: EventColumns,
    names: Sequence[str],
    limit: int | None = None,
    prefix: str = "",
) -> list[StreamEvents]:
    """Cut a table of events into streams.

    Args:
        schema: its timestamp field orders the events.
        columns: T events.
        names: T stream names, one per event.
        limit: keep only this many of the earliest events.
        prefix: put before every name.

    Raises:
        ReplayError: a name that the service does not accept.
    """
    field = schema.timestamp
    times = None if field is None else np.asarray(columns.values[field.name], np.int64)
    order = np.arange(columns.steps) if times is None else np.argsort(times, kind="stable")
    rows_of: dict[str, list[int]] = {}
    for row in order[:limit].tolist():
        rows_of.setdefault(names[row], []).append(row)
    streams = []
    for name, rows in rows_of.items():
        full = prefix + name
        if not is_stream_name(full):
            raise ReplayError(f"stream {full!r}: expected {STREAM_NAME_RULE}")
        events = EventColumns(
            len(rows),
            {key: values[rows] for key, values in columns.present.items()},
            {key: values[rows] for key, values in columns.values.items()},
        )
        streams.append(StreamEvents(full, events, None if times is None else times[rows]))
    return streams


def _read_frame(path: Path | None, by: By) -> pl.DataFrame:
    try:
        if path is None:
            return flight_events(by)
        check_duplicate_names(path)
        match path.suffix.lower():
            case ".csv":
                return pl.read_csv(path, infer_schema_length=None)
            case ".jsonl" | ".ndjson":
                return pl.read_ndjson(path, infer_schema_length=None)
            case ".parquet":
                return pl.read_parquet(path)
            case other:
                raise ReplayError(f"{path}: expected .csv, .jsonl or .parquet, got {other!r}")
    except ModelsError as error:
        raise ReplayError(str(error)) from error
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ReplayError(f"{path}: {error}") from error
