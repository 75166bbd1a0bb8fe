"""The events to replay: a table cut into streams, each in the order of its time.

Events are read under the model's own schema (`models.events.frame`), so that what is sent is
exactly the schema's fields and what is verified afterwards are the same values. A stream's
events are ordered by the timestamp field; ties, and schemas without one, by the order of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from carry_client import ModelDescription
from carry_client.steps import to_steps
from models.events.columns import EventColumns
from models.events.frame import columns_from_frame
from models.events.schema import EventSchema
from service.core.errors import OperatorError
from service.core.values import STREAM_NAME_RULE, is_stream_name


class ReplayError(OperatorError):
    """The replay cannot continue."""


@dataclass(frozen=True, slots=True)
class StreamEvents:
    """One stream's events.

    Attributes:
        name: the stream's name in requests, prefix included.
        columns: its T events in order.
        times_ms: int64 [T], epoch milliseconds; 0 if the schema has no timestamp.
    """

    name: str
    columns: EventColumns
    times_ms: NDArray[np.int64]

    def __len__(self) -> int:
        return self.columns.steps

    def events(self, start: int, stop: int) -> Any:
        """Events start..stop-1 as a request has them: timestamps as epoch milliseconds, without
        absent values."""
        part = self.columns[start:stop]
        return to_steps(
            {
                name: np.where(part.present[name], values.astype(object), None)
                for name, values in part.values.items()
            }
        )


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


def split_streams(
    schema: EventSchema,
    frame: pl.DataFrame,
    *,
    stream: str = "stream",
    limit: int | None = None,
    prefix: str = "",
) -> list[StreamEvents]:
    """Cut a table of events into streams, in the order of their first events.

    Args:
        schema: the model's events; its timestamp field orders them.
        stream: the column that names the stream.
        limit: keep only this many of the earliest events.
        prefix: put before every name.

    Raises:
        DataError: an event does not fit the schema.
        ReplayError: a stream has no name, or one that the service does not accept.
    """
    if stream not in frame.columns:
        raise ReplayError(f"--stream-column: expected one of {frame.columns}, got {stream!r}")
    names = frame[stream].cast(pl.String).to_list()
    columns = columns_from_frame(schema, frame)
    field = schema.timestamp
    times_ms = np.zeros(columns.steps) if field is None else columns.values[field.name]
    rows_of: dict[str | None, list[int]] = {}
    for row in np.argsort(times_ms, kind="stable")[:limit].tolist():
        rows_of.setdefault(names[row], []).append(row)
    streams = []
    for name, rows in rows_of.items():
        if name is None or not is_stream_name(prefix + name):
            got = "none" if name is None else repr(prefix + name)
            raise ReplayError(f"row {rows[0] + 1}: expected {STREAM_NAME_RULE}, got {got}")
        streams.append(
            StreamEvents(prefix + name, columns.take(rows), times_ms[rows].astype(np.int64))
        )
    return streams
