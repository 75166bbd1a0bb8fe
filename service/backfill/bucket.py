"""Stage 2: the outputs and states of one bucket, a pure function of its rows.

The same rows give the same bytes on every engine and machine: no clocks, no random numbers. A
stream's epoch and tag are a hash of the model, its name and its events, so that a repetition gives
the same head, and other events another one.

A bucket is computed in pieces of bounded size; a stream that is longer than a piece carries its
state to the next one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.errors import DataError
from models.events.columns import Block, EventColumns, block_of
from models.offline.runner import NO_MARKS, EventTable, Runner, StreamStates, TableResult
from models.offline.steps import open_step
from models.spec.layout import category_names, output_spec
from models.spec.model import schema_of
from models.spec.state import FloatArray, IntArray, State
from service.backfill.heads import HeadCutter, load_heads
from service.backfill.plan import Job, replacing
from service.backfill.record import BucketRecord, file_checksum, read_record
from service.backfill.rows import field_column, read_columns
from service.backfill.selection import HALTED, RowSelector
from service.backfill.shuffle import read_bucket
from service.core.values import EPOCH_BYTES, TAG_BYTES, Feed, SourceMark, StreamHead, StreamState
from service.store.backup import BLOCK_BYTES, BackupInfo, BackupWriter
from service.store.codec import encode_state
from service.store.source_mark import encode_mark

OUTPUT_ROWS = 65_536
"""Rows of a row group of the outputs."""

BytesArray = NDArray[np.uint8]

_RUNNERS: dict[str, Runner] = {}
"""The open runner of this process, by the fingerprint of its model."""


def compute_bucket(job: Job, bucket: int) -> BucketRecord:
    """Write the outputs, the states and the record of a bucket, unless it is finished.

    Raises:
        DataError: a stream cannot be computed.
        OSError: a file cannot be written.
    """
    # the process of the first attempt may have been lost with its result
    if (finished := read_record(job, bucket)) is not None:
        return finished
    started_s = time.monotonic()
    with replacing(job.states(bucket)) as states, replacing(job.outputs(bucket)) as outputs:
        with states.open("wb") as file:
            writer = _BucketWriter(job, bucket, file)
            write_outputs(writer.tables(read_bucket(job, bucket)), job, outputs)
            writer.finish()
        checksums = file_checksum(outputs), file_checksum(states)
        sizes = outputs.stat().st_size, states.stat().st_size
    if writer.halted_events:
        with replacing(job.rejected_bucket(bucket)) as path:
            _list_halted(job, writer.halted_events).write_parquet(path)
    record = BucketRecord(
        bucket=bucket,
        streams=writer.streams,
        events=writer.events,
        out_of_order=writer.out_of_order,
        duplicates=writer.selector.duplicates,
        halted_streams=writer.selector.halted,
        moved_streams=writer.moved,
        outputs_bytes=sizes[0],
        states_bytes=sizes[1],
        outputs_blake2b=checksums[0],
        states_blake2b=checksums[1],
        seconds=round(time.monotonic() - started_s, 3),
    )
    with replacing(job.record(bucket)) as path:
        path.write_bytes(msgspec.json.encode(record))
    return record


def _list_halted(job: Job, ended: list[pl.DataFrame]) -> pl.DataFrame:
    """The events of halted streams, as a list of rejected rows."""
    missing = pl.lit(None, pl.String)
    paths = {number: source.path for number, source in enumerate(job.plan.sources)}
    return pl.concat(ended).with_columns(
        file=pl.col("file").replace_strict(paths, return_dtype=pl.String),
        column=missing,
        reason=pl.lit(HALTED),
        value=missing,
    )


def output_types(job: Job) -> dict[str, Any]:
    """Columns and types of the outputs."""
    types: dict[str, Any] = {"stream": pl.String}
    if schema_of(job.spec).timestamp is not None:
        types["time"] = pl.Datetime("ms", "UTC")
    types["position"] = pl.Int64
    for output in output_spec(job.spec).outputs:
        kind = pl.String if output.categories_of else pl.Float32
        types.update(dict.fromkeys(output.column_names(), kind))
    return {**types, "file": pl.UInt32, "row": pl.UInt64}


def write_outputs(tables: Iterator[pl.DataFrame], job: Job, path: Path) -> None:
    """Write tables into one Parquet file, as they come."""
    failure: list[BaseException] = []

    def read(*_: object) -> Iterator[pl.DataFrame]:
        # polars would report another error than that of the function
        try:
            yield from tables
        except BaseException as error:
            failure.append(error)
            raise

    types = output_types(job)
    try:
        pl.io.plugins.register_io_source(read, schema=types).sink_parquet(
            path, row_group_size=OUTPUT_ROWS, engine="streaming"
        )
    except Exception as error:
        if failure:
            raise failure[0] from error
        raise


def _open_runner(job: Job) -> Runner:
    """The runner of a model, which this process opens once."""
    key = job.plan.fingerprint
    if key not in _RUNNERS:
        _RUNNERS.clear()
        _RUNNERS[key] = Runner(job.spec, job.weights, open_step(job.spec, job.weights, threads=1))
    return _RUNNERS[key]


@dataclass(slots=True)
class _OpenStream:
    """The last stream of a piece, which the next piece may continue.

    Attributes:
        digest: of its events so far.
        states: its state, of one stream.
        updated_ms: time of its last event, 0 if there is none.
        mark: the highest offset of its events in the topic that its last one came from.
        has_moved: whether others came from another partition of it.
    """

    name: str
    digest: Any
    states: StreamStates
    updated_ms: int
    mark: SourceMark | None
    has_moved: bool


class _BucketWriter:
    """Computes the rows of a bucket piece by piece, and writes the states of its streams."""

    def __init__(self, job: Job, bucket: int, file: BinaryIO):
        self._job, self._runner = job, _open_runner(job)
        # of the runner, which then encodes the block that the digests are of
        self._schema = schema_of(self._runner.spec)
        self._outputs = output_spec(job.spec)
        self._model, self._fingerprint = job.plan.model, bytes.fromhex(job.plan.fingerprint)
        self._digest = hashlib.blake2b(digest_size=EPOCH_BYTES + TAG_BYTES)
        self._digest.update(self._fingerprint + f"{self._model}/".encode())
        self._writer = BackupWriter(file, BackupInfo(0, "backfill", self._model, ""))
        self._records: list[list[Any]] = []
        self._size_bytes = 0
        self._open: _OpenStream | None = None
        self._cutter = HeadCutter(load_heads(job.out, bucket)) if job.plan.version else None
        self.selector = RowSelector(job.plan)
        self.halted_events: list[pl.DataFrame] = []
        self.streams = self.events = self.out_of_order = self.moved = 0

    def tables(self, pieces: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """Compute pieces, and yield the outputs of each."""
        for piece in pieces:
            if piece.height:
                rows, ended = self.selector.select(piece)
                if ended.height:
                    self.halted_events.append(ended.select("file", "row", "stream"))
                if self._cutter is not None:
                    rows = self._cutter.cut(rows)
                if rows.height:
                    yield self._compute(rows)

    def finish(self) -> None:
        """Write the last states: the file is complete."""
        self._close_stream()
        self._flush()
        self._writer.finish()

    def _compute(self, piece: pl.DataFrame) -> pl.DataFrame:
        block = block_of(self._schema, read_columns(self._schema, piece))
        runs = piece["stream"].rle().struct
        names: list[str] = runs.field("value").to_list()
        ends = np.cumsum(runs.field("len").to_numpy(), dtype=np.int64)
        starts = np.concatenate(([0], ends[:-1]))
        opened = self._open if self._open is not None and self._open.name == names[0] else None
        if opened is None:
            self._close_stream()
        marks = NO_MARKS
        if "reset" in piece.columns:
            marks = np.flatnonzero(piece["reset"].fill_null(False).to_numpy())
        result = self._run(piece, EventTable(EventColumns.of_block(block), starts, marks), opened)
        self.out_of_order += result.out_of_order
        self.events += piece.height
        self._collect_states(piece, block, names, starts, ends, opened, result.after)
        positions = np.arange(piece.height) - np.repeat(starts, ends - starts)
        if opened is not None:
            positions[: ends[0]] += opened.states.positions[0]
        return self._output_table(piece, positions, result.outputs)

    def _run(
        self, piece: pl.DataFrame, table: EventTable, opened: _OpenStream | None
    ) -> TableResult:
        try:
            result = self._runner.run_table(table, None if opened is None else opened.states)
        except DataError as error:
            at = error.index or 0
            raise self._error_at_row(piece, at, error.expected, error.got, error.field) from error
        for values in (result.outputs, result.after.floats):
            if not np.isfinite(values).all():
                at = int(np.argmax(~np.isfinite(values).all(axis=1)))
                row = at if values is result.outputs else int(table.starts[at])
                raise self._error_at_row(
                    piece, row, "finite outputs and states of the stream", "NaN or infinity"
                )
        return result

    def _error_at_row(
        self, piece: pl.DataFrame, at: int, expected: str, got: str, field: str | None = None
    ) -> DataError:
        row = piece.row(at, named=True)
        source = self._job.plan.sources[row["file"]].path
        place = f"{source}, row {row['row']}, stream {row['stream']!r}"
        return DataError(field=field, expected=f"{place}: {expected}", got=got)

    def _collect_states(
        self,
        piece: pl.DataFrame,
        block: Block,
        names: list[str],
        starts: IntArray,
        ends: IntArray,
        opened: _OpenStream | None,
        after: StreamStates,
    ) -> None:
        """Write the states of the streams that ended in a piece; the last one stays open."""
        seen = self._event_bytes(block, piece)
        last = piece[(ends - 1).tolist()]
        times = [0] * len(names)
        if self._schema.timestamp is not None:
            times = last[field_column(self._schema.timestamp.name)].fill_null(0).to_list()
        marks, moved = _highest_marks(piece), _moved_streams(piece)
        for at, (name, start, end) in enumerate(
            zip(names, starts.tolist(), ends.tolist(), strict=True)
        ):
            digest = self._new_digest(name) if opened is None or at else opened.digest
            digest.update(seen[start:end])
            cut = slice(at, at + 1)
            states = StreamStates(after.floats[cut], after.ints[cut], after.positions[cut])
            if at:
                self._close_stream()
            mark, has_moved = marks.get(name), name in moved
            if opened is not None and opened.mark is not None and not at:
                before = opened.mark
                has_moved |= opened.has_moved or (mark is not None and mark.source != before.source)
                if mark is None or before.covers(mark):
                    mark = before
            self._open = _OpenStream(name, digest, states, times[at], mark, has_moved)

    def _new_digest(self, stream: str) -> Any:
        digest = self._digest.copy()
        digest.update(len(stream).to_bytes(4, "little") + stream.encode())
        return digest

    def _event_bytes(self, block: Block, piece: pl.DataFrame) -> BytesArray:
        """What the network sees of each event, uint8 [T, W]."""
        parts = [np.ascontiguousarray(block.numbers.T, "<f8").view(np.uint8)]
        if block.times_ms is not None:
            parts.append(block.times_ms.astype("<i8").reshape(-1, 1).view(np.uint8))
        if "reset" in piece.columns:
            parts.append(piece["reset"].fill_null(False).to_numpy().astype(np.uint8)[:, np.newaxis])
        return np.ascontiguousarray(np.concatenate(parts, axis=1))

    def _close_stream(self) -> None:
        """Write the state of the open stream, if there is one."""
        stream, self._open = self._open, None
        if stream is None:
            return
        head = self._head(stream)
        if head is None:
            return
        value = encode_state(
            StreamState(
                head=head,
                feed=Feed.EVENTS,
                fingerprint=self._fingerprint,
                last=None,
                updated_ms=stream.updated_ms,
                state=State(stream.states.floats[0], stream.states.ints[0]),
                source=stream.mark,
            )
        )
        self._records.append([self._model, stream.name, value])
        self._size_bytes += len(value)
        self.streams += 1
        self.moved += stream.has_moved
        if self._size_bytes >= BLOCK_BYTES:
            self._flush()

    def _head(self, stream: _OpenStream) -> StreamHead | None:
        """The head of a stream that has ended; None if the live stream has more events."""
        position = int(stream.states.positions[0])
        if self._cutter is not None:
            return self._cutter.find_head(stream.name, position)
        if stream.mark is not None:
            # another mark is another state: one that was loaded without it is not this one
            stream.digest.update(encode_mark(stream.mark))
        digest = stream.digest.digest()
        return StreamHead(digest[:EPOCH_BYTES], digest[EPOCH_BYTES:], position)

    def _flush(self) -> None:
        if self._records:
            self._writer.write(self._records)
        self._records, self._size_bytes = [], 0

    def _output_table(
        self, piece: pl.DataFrame, positions: IntArray, packed: FloatArray
    ) -> pl.DataFrame:
        table: dict[str, Any] = {"stream": piece["stream"]}
        if self._schema.timestamp is not None:
            times = piece[field_column(self._schema.timestamp.name)]
            table["time"] = times.cast(pl.Datetime("ms", "UTC"))
        table["position"] = positions
        for output in self._outputs.outputs:
            columns = self._outputs.by_name(packed)[output.name].reshape(piece.height, -1).T
            series = list(map(pl.Series, columns))
            if output.categories_of:
                names = category_names(self._job.spec, output)
                series = [pl.Series(names[column.astype(np.intp)]) for column in columns]
            table.update(zip(output.column_names(), series, strict=True))
        return pl.DataFrame({**table, "file": piece["file"], "row": piece["row"]})


def _highest_marks(piece: pl.DataFrame) -> dict[str, SourceMark]:
    """The highest offset of each stream's events in the topic that its last one came from; events
    may be ordered by time otherwise than in their topic."""
    if "offset" not in piece.columns:
        return {}
    last = (
        piece.select("stream", "source", "offset", "sequence")
        .drop_nulls()
        .filter(pl.col("source") == pl.col("source").last().over("stream"))
        .sort("offset", "sequence")
        .group_by("stream")
        .last()
    )
    return {name: SourceMark(*place) for name, *place in last.iter_rows()}


def _moved_streams(piece: pl.DataFrame) -> set[str]:
    """The streams with events of several partitions of a topic."""
    if "offset" not in piece.columns:
        return set()
    placed = piece.select("stream", "source", "offset").drop_nulls()
    sources = placed.group_by("stream").agg(pl.col("source").n_unique())
    return set(sources.filter(pl.col("source") > 1)["stream"])
