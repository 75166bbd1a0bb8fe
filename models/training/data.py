"""Converts a table of events to encoded streams, with their split.

`models.training.files` reads the table from a file, and `models.events.frame` its columns as
fields, the same for training, evaluation and replay. Rows of one stream are put in the order of
`order_by` (the timestamp field by default); rows that tie keep the order of the file.

Errors name the file, the column and the row (data rows counted from 1).

The split is by two times, the same for all streams, or by shares of each stream's events. What is
compared is `Streams.split_keys`: the time of an event, or its position within its stream. In both
cases every stream's validation events follow its training events, and its test events follow those.
By shares, one stream's test events can be at the time of another's training events: split by time
if streams depend on each other.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import ValidationError

from models.errors import DataError, SpecError
from models.events.columns import EventColumns
from models.events.encode import Clock, encode, event_times
from models.events.fit import fit_schema
from models.events.frame import columns_from_frame, resolve_forms
from models.events.schema import (
    CategoricalField,
    EventSchema,
    NumericField,
    TimestampField,
)
from models.spec.heads import DEFAULT_TOP, MAX_ALL, ClassificationHead
from models.spec.model import ModelSpec, schema_of
from models.spec.resets import find_resets, segments_of
from models.spec.training import ResolvedTraining, TrainingSpec

POSITIONS = 1_000_000
"""Positions within a stream are in 1 / `POSITIONS` of its events."""


@dataclass(frozen=True)
class Streams:
    """All streams of a table, one after another.

    Attributes:
        names: S names, sorted.
        spans: per stream, its first row and one past its last.
        sessions: the same, cut where the model resets the state by itself; each starts from the
            initial state.
        frame: the rows in this order, as they were read.
        table_rows: int64 [rows], index of each row in the table.
        columns: the same rows as event columns.
        moments_ms: int64 [rows], epoch milliseconds of each event; an event without a timestamp has
            its predecessor's.
        split_keys: int64 [rows], by which data are split (`models.training.data`): the moments, or
            the positions within the streams.
    """

    names: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    sessions: tuple[tuple[int, int], ...]
    frame: pl.DataFrame
    table_rows: NDArray[np.int64]
    columns: EventColumns
    moments_ms: NDArray[np.int64]
    split_keys: NDArray[np.int64]

    @property
    def events(self) -> int:
        """Rows of all streams."""
        return self.frame.height

    def by_moment(self) -> Streams:
        """A copy that is split by moments."""
        return replace(self, split_keys=self.moments_ms)

    def name_of(self, row: int) -> str:
        """The name of the stream that a row belongs to."""
        return self.names[bisect_right(self._starts, row) - 1]

    @cached_property
    def _starts(self) -> list[int]:
        return [start for start, _ in self.spans]

    def windows(self, spans: Sequence[tuple[int, int]]) -> Streams:
        """The rows of some spans, each as a stream of its own from its first row on.

        Args:
            spans: each within one stream.
        """
        session_starts = [start for start, _ in self.sessions]
        own: list[tuple[int, int]] = []
        sessions: list[tuple[int, int]] = []
        end = 0
        for start, stop in spans:
            first = bisect_right(session_starts, start)
            cuts = session_starts[first : bisect_left(session_starts, stop)]
            begins = [end + cut - start for cut in (start, *cuts)]
            own.append((end, end := end + stop - start))
            sessions += zip(begins, [*begins[1:], end], strict=True)
        rows = np.concatenate([np.arange(*span) for span in spans])
        return Streams(
            tuple([self.name_of(start) for start, _ in spans]),
            tuple(own),
            tuple(sessions),
            self.frame[rows],
            self.table_rows[rows],
            self.columns.take(rows),
            self.moments_ms[rows],
            self.split_keys[rows],
        )

    @cached_property
    def has_next(self) -> NDArray[np.bool_]:
        """Whether an event is followed by another of its stream, bool [rows]."""
        followed = np.ones(self.events, np.bool_)
        followed[[stop - 1 for _, stop in self.spans]] = False
        return followed

    def encoded(self, schema: EventSchema) -> NDArray[np.float32]:
        """Rows float32 [rows, F], every session encoded from its beginning."""
        rows = np.zeros((self.events, len(schema.columns)), np.float32)
        for start, stop in self.sessions:
            rows[start:stop], _ = encode(schema, self.columns[start:stop], Clock())
        return rows


def without_normalisation(spec: ModelSpec) -> ModelSpec:
    """The spec with every number standardised by the training data, as baselines read them."""
    fields = [
        field.model_copy(update={"normalisation": None})
        if isinstance(field, NumericField)
        else field
        for field in schema_of(spec).fields
    ]
    events = schema_of(spec).model_copy(update={"fields": tuple(fields)})
    return spec.model_copy(update={"events": events})


def training_of(spec: ModelSpec) -> ResolvedTraining:
    """The spec's `training`, resolved by `models.training.defaults`.

    Raises:
        SpecError: there is none, or an option is open.
    """
    training = unresolved_training_of(spec)
    try:
        return ResolvedTraining.model_validate(training.model_dump())
    except ValidationError as error:
        options = ", ".join(str(item["loc"][0]) for item in error.errors() if item["loc"])
        options = options or "its split"
        raise SpecError(
            f"model {spec.name!r}: expected `training` with every option, got none of {options}"
        ) from error


def unresolved_training_of(spec: ModelSpec) -> TrainingSpec:
    """The spec's `training` as written; SpecError if there is none."""
    if spec.training is None:
        raise SpecError(
            f"model {spec.name!r}: expected `training`, which names the stream's column"
        )
    return spec.training


def streams_of(spec: ModelSpec, frame: pl.DataFrame, source: str = "data") -> Streams:
    """Sort a table into streams.

    Args:
        spec: with `events` and `training`; the schema need not be fitted.
        frame: one row per event.
        source: what errors call the table.

    Raises:
        DataError: no rows, a column that is not there, a stream without a name, or a value
            that the schema rejects.
        SpecError: the events have no time.
    """
    schema, training = schema_of(spec), unresolved_training_of(spec)
    if not isinstance(frame, pl.DataFrame):
        raise _no_polars(frame, source)
    if frame.height == 0:
        raise DataError(expected=f"{source}: at least one row", got="none")
    order = training.order_by or (schema.timestamp.name if schema.timestamp else None)
    for name in (training.stream, order):
        if name is not None and name not in frame.columns:
            raise DataError(
                field=name, expected=f"{source}: a column of that name", got=f"{frame.columns}"
            )
    keyed = frame.with_columns(_stream=pl.col(training.stream).cast(pl.String))
    nameless = keyed["_stream"].is_null()
    if nameless.any():
        raise DataError(
            field=training.stream,
            expected=f"{source}, row {int(nameless.arg_true()[0]) + 1}: a stream's name",
            got="none",
        )
    keys: list[Any] = [pl.col("_stream")]
    try:
        columns = columns_from_frame(schema, frame)
        moments = _moments(schema, training, columns, frame)
        if order is not None:
            keyed = keyed.with_columns(_order=_order(schema, order, columns, frame))
            keys.append(pl.col("_order"))
    except DataError as error:
        raise error.in_table(source) from error
    rows = keyed.with_row_index("_row").sort(keys, maintain_order=True)["_row"]
    rank = rows.to_numpy().astype(np.int64)
    keyed = keyed[rank]
    runs = keyed["_stream"].rle().struct.unnest()
    ends = np.cumsum(runs["len"].to_numpy().astype(np.int64))
    starts = np.concatenate(([0], ends[:-1]))
    spans = tuple(zip(starts.tolist(), ends.tolist(), strict=True))
    names = tuple(runs["value"].to_list())
    present = moments[1][rank]
    for name, (start, stop) in zip(names, spans, strict=True):
        if not present[start:stop].any():
            raise DataError(
                field=schema.timestamp.name if schema.timestamp else order,
                expected=f"{source}, row {rank[start] + 1}: a moment in stream {name!r}",
                got="none in any of its rows",
            )
    ordered = columns.take(rank)
    filled = _fill_moments(moments[0][rank], present, spans)
    return Streams(
        names,
        spans,
        _sessions(spec, ordered, spans),
        frame[rank],
        rank,
        ordered,
        filled,
        _positions(spans) if training.is_split_by_share else filled,
    )


def _no_polars(frame: Any, source: str) -> DataError:
    """The error of a table of another library; an index of pandas would be lost silently."""
    names = [name for name in getattr(getattr(frame, "index", None), "names", ()) if name]
    reset = "frame.reset_index()" if names else "frame"
    got = f"one of {type(frame).__module__.partition('.')[0]}"
    return DataError(
        expected=f"{source}: a DataFrame of Polars; convert it: polars.from_pandas({reset})",
        got=f"{got}, whose index is {', '.join(map(repr, names))}" if names else got,
    )


def _sessions(
    spec: ModelSpec, columns: EventColumns, spans: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], ...]:
    if not spec.resets.is_active:
        return spans
    schema = schema_of(spec)
    sessions: list[tuple[int, int]] = []
    for start, stop in spans:
        times = event_times(schema, columns[start:stop])
        resets = find_resets(spec.resets, stop - start, 0, times=times)
        sessions += [(start + a, start + b) for a, b in segments_of(stop - start, resets)]
    return tuple(sessions)


def moment_ms(schema: EventSchema, text: str, name: str) -> int:
    """Epoch milliseconds of an RFC 3339 moment, in the schema's zone if it has none.

    Raises:
        SpecError: it is no such moment; `name` is what the message calls it.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise SpecError(f"{name}: expected a moment such as 2013-10-01, got {text!r}") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=ZoneInfo(schema.timezone))
    return round(moment.timestamp() * 1000)


def moment_text(schema: EventSchema, moment: Any) -> str:
    """Epoch milliseconds as RFC 3339 in the schema's zone."""
    seconds, milliseconds = divmod(int(moment), 1000)
    local = datetime.fromtimestamp(seconds, ZoneInfo(schema.timezone))
    local = local.replace(microsecond=1000 * milliseconds)
    return local.isoformat(timespec="milliseconds" if milliseconds else "seconds")


def fitted_spec(spec: ModelSpec, streams: Streams, before: int) -> ModelSpec:
    """The spec with its schema fitted on the events before a key of the split, and on no others.

    A classification head with a large vocabulary gets the most probable categories as outputs.

    Raises:
        DataError: there are no such events.
    """
    training = unresolved_training_of(spec)
    training_frame = streams.frame.filter(pl.Series(streams.split_keys < before))
    if training_frame.height == 0:
        name = "validation" if training.is_split_by_share else "`validate_from`"
        raise DataError(expected=f"events before {name}", got="none")
    # the rows are already in the order of streams and times
    resolved = resolve_forms(schema_of(spec), streams.frame)
    schema = fit_schema(resolved, training_frame, stream=training.stream, resets=spec.resets)
    large = {
        field.name
        for field in schema.fields
        if isinstance(field, CategoricalField) and len(field.vocabulary or ()) > MAX_ALL
    }
    heads = [
        head.model_copy(update={"top": head.top or DEFAULT_TOP})
        if isinstance(head, ClassificationHead) and head.target in large
        else head
        for head in spec.heads
    ]
    return spec.model_copy(update={"events": schema, "heads": tuple(heads)})


def _order(schema: EventSchema, name: str, columns: EventColumns, frame: pl.DataFrame) -> pl.Series:
    """The column that sorts a stream's rows: moments and numbers by value, also as strings."""
    if schema.timestamp is not None and name == schema.timestamp.name:
        present = columns.present[name]
        if not present.all():
            raise DataError(
                index=int(np.argmin(present)),
                field=name,
                expected="a moment to order by",
                got="none",
            )
        return pl.Series(columns.values[name])
    column = frame[name]
    if column.dtype == pl.String:
        number = column.str.strip_chars().cast(pl.Float64, strict=False)
        if number.null_count() == column.null_count():
            return number
    return column


def _moments(
    schema: EventSchema, training: TrainingSpec, columns: EventColumns, frame: pl.DataFrame
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    if schema.timestamp is not None:
        name = schema.timestamp.name
        return columns.values[name], columns.present[name]
    if training.order_by is None:
        raise SpecError(
            "training: expected a timestamp field or `order_by` with a column of timestamps, "
            "since data are split by time"
        )
    field = TimestampField(name=training.order_by) if training.order_by.isidentifier() else None
    if field is None:
        raise SpecError(
            f"training.order_by: expected a plain column name, got {training.order_by!r}"
        )
    only = EventSchema(timezone=schema.timezone, fields=(field,))
    parsed = columns_from_frame(only, frame)
    return parsed.values[field.name], parsed.present[field.name]


def _positions(spans: tuple[tuple[int, int], ...]) -> NDArray[np.int64]:
    """The position of each event within its stream, int64 [rows]."""
    parts = [np.arange(stop - start) * POSITIONS // (stop - start) for start, stop in spans]
    return np.concatenate(parts).astype(np.int64)


def _fill_moments(
    moments_ms: NDArray[np.int64],
    present: NDArray[np.bool_],
    spans: tuple[tuple[int, int], ...],
) -> NDArray[np.int64]:
    """Fill absent moments with the one before them in their stream, and leading ones with the first
    known one. Every stream has at least one."""
    if present.all():
        return moments_ms
    filled = moments_ms.copy()
    for start, stop in spans:
        present_rows = np.flatnonzero(present[start:stop])
        last = np.searchsorted(present_rows, np.arange(stop - start), side="right") - 1
        filled[start:stop] = moments_ms[start:stop][present_rows[np.maximum(last, 0)]]
    return filled


class Split(NamedTuple):
    """Where validation and test begin.

    Attributes:
        validate, test: key of the first event of each.
        train_range, validation_range, test_range: the events of each, in words.
    """

    validate: int
    test: int
    train_range: str
    validation_range: str
    test_range: str


def split_of(spec: ModelSpec) -> Split:
    """The split of a spec with resolved `training`.

    Raises:
        SpecError: a time cannot be read, or the test begins before validation does.
    """
    schema, training = schema_of(spec), training_of(spec)
    if training.is_split_by_share:
        validate_share, test_share = training.validate_share or 0.0, training.test_share or 0.0
        return Split(
            round((1 - validate_share - test_share) * POSITIONS),
            round((1 - test_share) * POSITIONS),
            f"before the last {validate_share + test_share:.4g} of each stream",
            f"in the {validate_share:.4g} of each stream before its test events (validate_share)",
            f"in the last {test_share:.4g} of each stream",
        )
    validate_from, test_from = training.validate_from or "", training.test_from or ""
    split = Split(
        moment_ms(schema, validate_from, "training.validate_from"),
        moment_ms(schema, test_from, "training.test_from"),
        f"before {validate_from} (validate_from)",
        f"from {validate_from} to before {test_from} (test_from)",
        f"from {test_from} on",
    )
    if split.test < split.validate:
        raise SpecError(
            "training.test_from: expected a moment at or after validate_from "
            f"({validate_from!r}), got {test_from!r}"
        )
    return split
