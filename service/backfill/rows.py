"""Turns rows of a source into the events of a unit, and finds those that cannot be read.

`models.events` has the rules for the values of fields: those by which training reads a table.
"""

from __future__ import annotations

import zlib
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl

from models.errors import DataError
from models.events.cells import parse_cells
from models.events.columns import BoolArray, EventColumns
from models.events.frame import InvalidRows, canonical_frame, columns_from_canonical, find_overflows
from models.events.parse import RESET, can_mark_resets
from models.events.schema import BooleanField, EventSchema, TimestampField
from models.spec.stream_name import STREAM_NAME_RULE, is_stream_name
from service.backfill.plan import Plan, Source
from service.backfill.source import Batch
from service.store.source_mark import source_name

BEFORE_FIRST_EVENT: Final = -(2**63)
"""The order of a rejected event without a valid one: its stream ends before its first event."""

SHOWN_CHARS: Final = 200
_ENTRY_ID: Final = r"^(\d{1,19})-(\d{1,19})$"
_OFFSET: Final = r"^(\d{1,19})()$"


def field_column(name: str) -> str:
    """The column of a unit with the values of a field, which may have the name of another one."""
    return f".{name}"


def read_columns(schema: EventSchema, frame: pl.DataFrame) -> EventColumns:
    """The events of rows of units."""
    fields = [pl.col(field_column(field.name)).alias(field.name) for field in schema.fields]
    return columns_from_canonical(schema, frame.select(fields))


class Unit(NamedTuple):
    """Rows as events, sorted, and those that were rejected."""

    events: pl.DataFrame
    rejected: pl.DataFrame


class RowReader:
    """Turns batches of a source into units."""

    def __init__(self, plan: Plan, schema: EventSchema, file: int):
        self._plan, self._schema, self._file = plan, schema, file
        self._source: Source = plan.sources[file]
        self._marks_resets = can_mark_resets(schema)
        self._order_field = next((f for f in schema.fields if f.name == plan.order), None)
        fields = [field.name for field in schema.fields]
        keys = [plan.stream, plan.order, plan.offset, plan.topic_partition]
        self.names = list(
            dict.fromkeys([*fields, *filter(None, keys), *[RESET] * self._marks_resets])
        )
        self.required = list(
            dict.fromkeys(
                [name for name in keys if name is not None]
                + [field.name for field in schema.fields if not field.optional]
            )
        )
        self._prefix = zlib.crc32(f"{plan.model}/".encode())

    def read(self, batch: Batch) -> Unit:
        """Read the rows of a batch.

        Raises:
            DataError: a column is of another type, or a row is rejected that ends the run.
        """
        try:
            return self._read(batch)
        except DataError as error:
            raise error.in_table(self._source.path, int(batch.rows[0]) - 1) from error

    def _read(self, batch: Batch) -> Unit:
        invalid = list(batch.malformed)
        streams = self._streams(batch.frame[self._plan.stream], invalid)
        frame = self._typed(batch, invalid)
        canonical, rejected = canonical_frame(self._schema, frame)
        invalid += rejected + find_overflows(self._schema, canonical)
        order = self._order(canonical, frame, invalid)
        table: dict[str, Any] = {
            "order": order,
            "file": pl.repeat(self._file, frame.height, dtype=pl.UInt32, eager=True),
            "row": pl.Series(batch.rows),
        }
        if self._marks_resets:
            table[RESET] = self._resets(frame, invalid)
        if self._plan.offset is not None:
            table |= self._offsets(batch.frame, invalid)
        wrong = _is_any(invalid, frame.height)
        if wrong.any() and self._plan.on_error == "fail":
            raise min((each.error() for each in invalid), key=lambda error: error.index or 0)
        kept = ~wrong
        events = pl.DataFrame(table).hstack(canonical.rename(field_column).get_columns())
        if self._plan.on_error == "halt":
            # only an event of a known stream ends one
            kept |= streams["bucket"].is_not_null().to_numpy()
            unordered = _is_any([e for e in invalid if e.field == self._plan.order], frame.height)
            known = pl.when(pl.Series(~unordered)).then(pl.col("order"))
            order_or_first = known.otherwise(BEFORE_FIRST_EVENT)
            events = events.with_columns(order=order_or_first, rejected=pl.Series(wrong))
        return Unit(
            _sorted(pl.concat([streams, events], how="horizontal"), kept),
            self._rejected(batch, streams["stream"], invalid, wrong),
        )

    def _typed(self, batch: Batch, invalid: list[InvalidRows]) -> pl.DataFrame:
        """The batch with its text cells parsed as its fields say."""
        text = batch.frame.select(name for name in batch.frame.columns if name in batch.text)
        typed, wrong = parse_cells(self._schema, text)
        invalid += wrong
        return batch.frame.with_columns(typed.get_columns())

    def _streams(self, column: pl.Series, invalid: list[InvalidRows]) -> pl.DataFrame:
        """The bucket, the name and the rank by these of each row's stream; null if it has none."""
        if not (column.dtype.is_integer() or column.dtype in (pl.String, pl.Categorical, pl.Enum)):
            raise DataError(
                field=column.name,
                expected="a column of strings or integers",
                got=f"one of {column.dtype}",
            )
        named = column.cast(pl.String).alias("stream").to_frame()
        names = named["stream"].unique().drop_nulls().to_list()
        # the streams of `carry score` are in no store, and may have any name
        is_valid = bool if self._plan.on_error == "fail" else is_stream_name
        valid = [name for name in names if is_valid(name)]
        crc32, prefix, plan = zlib.crc32, self._prefix, self._plan
        buckets = [plan.bucket_of(crc32(name.encode(), prefix) % plan.partitions) for name in valid]
        known = (
            pl.DataFrame({"stream": valid, "bucket": buckets}, schema=_STREAM)
            .sort("bucket", "stream")
            .with_row_index("rank")
        )
        placed = named.join(known, on="stream", how="left", maintain_order="left")
        wrong = placed["bucket"].is_null()
        if wrong.any():
            names_got = placed["stream"]
            invalid.append(
                InvalidRows(
                    column.name,
                    wrong.to_numpy(),
                    f"a stream's name, {STREAM_NAME_RULE}",
                    lambda row: "none" if names_got[row] is None else repr(names_got[row]),
                )
            )
        return placed

    def _order(
        self, canonical: pl.DataFrame, frame: pl.DataFrame, invalid: list[InvalidRows]
    ) -> pl.Series:
        """What orders the events of a stream; null if it is missing or rejected."""
        name = self._plan.order
        if name is None:
            return pl.repeat(0, frame.height, dtype=pl.Int64, eager=True)
        if isinstance(self._order_field, TimestampField):
            order = canonical[name]
        else:
            order = self._numbers_or_times(frame[name], invalid)
        absent = (frame[name].is_null() & order.is_null()).to_numpy()
        if absent.any():
            invalid.append(InvalidRows(name, absent, "a value to order by", lambda _: "none"))
        return order

    def _numbers_or_times(self, column: pl.Series, invalid: list[InvalidRows]) -> pl.Series:
        """A column of whole numbers as it is, or of times in epoch milliseconds."""
        name = column.name
        if column.dtype.is_numeric() or column.dtype == pl.String:
            numbers = column.cast(pl.Int64, strict=False)
            if column.dtype.is_numeric():
                is_number = pl.repeat(True, len(column), eager=True)
                wrong = column.is_not_null() & (numbers != column).fill_null(True)
            else:
                is_number = column.str.contains(r"^-?\d+$").fill_null(True)
                wrong = column.is_not_null() & is_number & numbers.is_null()
            if wrong.any():
                expected = "a whole number of 64 bits, or a time"
                invalid.append(
                    InvalidRows(name, wrong.to_numpy(), expected, lambda row: f"{column[row]}")
                )
            if is_number.all():
                return numbers
            rest = pl.when(pl.Series(~is_number)).then(pl.Series(column))
            times = self._times(pl.select(rest.alias(name)).to_series(), invalid)
            chosen = pl.when(pl.Series(is_number)).then(pl.Series(numbers))
            return pl.select(chosen.otherwise(pl.Series(times))).to_series()
        return self._times(column, invalid)

    def _times(self, column: pl.Series, invalid: list[InvalidRows]) -> pl.Series:
        """Times in epoch milliseconds, local ones in the schema's time zone."""
        field = TimestampField(name="x", optional=True, without_offset="local")
        schema = EventSchema(timezone=self._schema.timezone, fields=(field,))
        times, wrong = canonical_frame(schema, column.alias("x").to_frame())
        invalid += [each._replace(field=column.name) for each in wrong]
        return times["x"]

    def _resets(self, frame: pl.DataFrame, invalid: list[InvalidRows]) -> pl.Series:
        """Whether the state is reset before each event."""
        if RESET not in frame.columns:
            return pl.repeat(False, frame.height, dtype=pl.Boolean, eager=True)
        schema = EventSchema(fields=(BooleanField(name=RESET, optional=True, coerce=True),))
        typed, wrong_cells = parse_cells(schema, frame.select(RESET))
        marks, wrong = canonical_frame(schema, typed)
        invalid += [*wrong_cells, *wrong]
        return marks[RESET].fill_null(False)

    def _offsets(self, frame: pl.DataFrame, invalid: list[InvalidRows]) -> dict[str, pl.Series]:
        """The source, offset and sequence of each event in its topic; null if it has none."""
        plan = self._plan
        name, topic, partition = plan.offset or "", plan.topic or "", plan.topic_partition
        text = frame[name].cast(pl.String)
        pattern = _ENTRY_ID if partition is None else _OFFSET
        parts = text.str.extract_groups(pattern).struct.rename_fields(["offset", "sequence"])
        offset = parts.struct.field("offset").cast(pl.UInt64, strict=False)
        sequence = parts.struct.field("sequence").cast(pl.UInt64, strict=False).fill_null(0)
        if (wrong := offset.is_null() & text.is_not_null()).any():
            expected = "an offset of Kafka"
            if partition is None:
                expected = "the id of an entry such as 1700000000000-3; of Kafka a partition too"
            rows = wrong.to_numpy()
            invalid.append(InvalidRows(name, rows, expected, lambda row: repr(text[row])))
        source = pl.repeat(topic, len(text), dtype=pl.String, eager=True)
        if partition is not None:
            column = frame[partition]
            numbers = column.cast(pl.String).str.strip_chars().cast(pl.UInt32, strict=False)
            if (wrong := numbers.is_null() & text.is_not_null()).any():
                rows, expected = wrong.to_numpy(), "the number of a partition"
                invalid.append(
                    InvalidRows(partition, rows, expected, lambda row: repr(column[row]))
                )
            names = {number: source_name(topic, number) for number in numbers.drop_nulls().unique()}
            source = numbers.replace_strict(names, default=None, return_dtype=pl.String)
        return {"source": source, "offset": offset, "sequence": sequence}

    def _rejected(
        self, batch: Batch, streams: pl.Series, invalid: list[InvalidRows], wrong: BoolArray
    ) -> pl.DataFrame:
        """The rejected rows, each with its first reason."""
        reasons: dict[int, InvalidRows] = {}
        for each in invalid:
            for row in np.flatnonzero(each.rows).tolist():
                reasons.setdefault(row, each)
        rows = np.flatnonzero(wrong).tolist()
        return pl.DataFrame(
            {
                "file": [self._source.path] * len(rows),
                "row": batch.rows[rows],
                "stream": streams.gather(rows),
                "column": [reasons[row].field for row in rows],
                "reason": ["expected " + reasons[row].expected for row in rows],
                "value": [reasons[row].got(row)[:SHOWN_CHARS] for row in rows],
            },
            schema=REJECTED,
        )


_STREAM: Final[dict[str, Any]] = {"stream": pl.String, "bucket": pl.UInt32}


def _is_any(invalid: list[InvalidRows], rows: int) -> BoolArray:
    """Whether each row is one of them."""
    return np.any([np.zeros(rows, np.bool_), *(each.rows for each in invalid)], axis=0)


REJECTED: Final[dict[str, Any]] = {
    "file": pl.String,
    "row": pl.UInt64,
    "stream": pl.String,
    "column": pl.String,
    "reason": pl.String,
    "value": pl.String,
}
_SORTED: Final = ("bucket", "stream", "order", "file", "row")


def _sorted(frame: pl.DataFrame, kept: BoolArray) -> pl.DataFrame:
    """Those rows by bucket, stream, file and row."""
    if not kept.all():
        frame = frame.filter(pl.Series(kept))
    # the reader of a bucket sorts its streams by order
    ordered = frame.sort("rank", maintain_order=True).drop("rank")
    return ordered.select(*_SORTED, pl.exclude(_SORTED))
