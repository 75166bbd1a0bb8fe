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
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.errors import DataError
from models.events.columns import EventColumns, block_of
from models.events.encode import event_times
from models.offline.runner import OrderedEvents, Runner
from models.offline.steps import FloatArray
from models.spec.layout import output_spec, state_spec
from models.spec.model import schema_of
from models.spec.resets import EventTimes
from models.spec.state import State
from service.backfill.plan import Job, replacing
from service.backfill.shuffle import read_bucket, read_columns
from service.core.values import EPOCH_BYTES, TAG_BYTES, Feed, StreamHead, StreamState
from service.store.backup import BLOCK_BYTES, BackupInfo, BackupWriter
from service.store.codec import encode_state

CHUNK, BATCH = 64, 256
"""Events and streams of one call of the network."""

OUTPUT_ROWS = 65_536
"""Rows of a row group of the outputs."""

BytesArray = NDArray[np.uint8]


class BucketRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The record of a finished bucket.

    Attributes:
        bucket: its number.
        streams, events: computed.
        out_of_order: events that are earlier than one before them in their stream.
        outputs_bytes, states_bytes: sizes of its files.
        outputs_blake2b, states_blake2b: BLAKE2b of these, 32 bytes in hexadecimal.
        seconds: that it took.
    """

    bucket: int
    streams: int
    events: int
    out_of_order: int
    outputs_bytes: int
    states_bytes: int
    outputs_blake2b: str
    states_blake2b: str
    seconds: float


def compute_bucket(job: Job, bucket: int) -> BucketRecord:
    """Write the outputs, the states and the record of a bucket.

    Raises:
        DataError: a stream cannot be computed.
        OSError: a file cannot be written.
    """
    started_s = time.monotonic()
    with replacing(job.states(bucket)) as states, replacing(job.outputs(bucket)) as outputs:
        with states.open("wb") as file:
            writer = _BucketWriter(job, file)
            write_outputs(writer.tables(read_bucket(job, bucket)), job, outputs)
            writer.finish()
        record = BucketRecord(
            bucket=bucket,
            streams=writer.streams,
            events=writer.events,
            out_of_order=writer.out_of_order,
            outputs_bytes=outputs.stat().st_size,
            states_bytes=states.stat().st_size,
            outputs_blake2b=file_checksum(outputs),
            states_blake2b=file_checksum(states),
            seconds=round(time.monotonic() - started_s, 3),
        )
    with replacing(job.record(bucket)) as path:
        path.write_bytes(msgspec.json.encode(record))
    return record


def read_record(job: Job, bucket: int) -> BucketRecord | None:
    """The record of a bucket; None if it has none, or files of other sizes than it says."""
    try:
        record = msgspec.json.decode(job.record(bucket).read_bytes(), type=BucketRecord)
        sizes = job.outputs(bucket).stat().st_size, job.states(bucket).stat().st_size
    except (OSError, msgspec.MsgspecError):
        return None
    return record if sizes == (record.outputs_bytes, record.states_bytes) else None


def file_checksum(path: Path) -> str:
    """BLAKE2b of a file, 32 bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def output_types(job: Job) -> dict[str, Any]:
    """Columns and types of the outputs."""
    types: dict[str, Any] = {"stream": pl.String}
    if schema_of(job.spec).timestamp is not None:
        types["time"] = pl.Datetime("ms", "UTC")
    types["position"] = pl.Int64
    for output in output_spec(job.spec).outputs:
        types.update(dict.fromkeys(output.column_names(), pl.Float32))
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


@lru_cache(maxsize=1)
def _runner(fingerprint: str, job: _Hashable) -> Runner:
    return Runner(job.job.spec, job.job.weights)


class _Hashable:
    """A job as an argument of a cached function, whose other arguments identify it."""

    def __init__(self, job: Job):
        self.job = job

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable)

    def __hash__(self) -> int:
        return 0


@dataclass(slots=True)
class _Stream:
    """A stream while it is computed."""

    name: str
    state: State
    digest: Any
    position: int = 0
    last_ms: int = 0
    latest_ms: int = field(default=-(2**62))


class _BucketWriter:
    """Computes the rows of a bucket piece by piece, and writes the states of its streams."""

    def __init__(self, job: Job, file: BinaryIO):
        self._job, self._schema = job, schema_of(job.spec)
        self._runner = _runner(job.plan.fingerprint, _Hashable(job))
        self._layout, self._outputs = state_spec(job.spec), output_spec(job.spec)
        self._fingerprint = bytes.fromhex(job.plan.fingerprint)
        self._writer = BackupWriter(file, BackupInfo(0, "backfill", job.plan.model, ""))
        self._records: list[list[Any]] = []
        self._size_bytes = 0
        self._open: _Stream | None = None
        self.streams = self.events = self.out_of_order = 0

    def tables(self, pieces: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """Compute pieces; yields the outputs of each."""
        for piece in pieces:
            if piece.height:
                yield self._compute(piece)

    def finish(self) -> None:
        """Write the last states: the file is complete."""
        if self._open is not None:
            self._write(self._open)
            self._open = None
        self._flush()
        self._writer.finish()

    def _compute(self, piece: pl.DataFrame) -> pl.DataFrame:
        columns = read_columns(self._schema, piece)
        runs = piece["stream"].rle()
        names = runs.struct.field("value").to_list()
        stops = np.cumsum(runs.struct.field("len").to_numpy()).tolist()
        starts = [0, *stops[:-1]]
        streams = [self._stream(name) for name in names]
        packed, states = self._run(streams, columns, starts, stops)
        records = self._event_bytes(columns, piece)
        times = event_times(self._schema, columns)
        positions = np.empty(piece.height, np.int64)
        for stream, state, start, stop in zip(streams, states, starts, stops, strict=True):
            positions[start:stop] = np.arange(stream.position, stream.position + stop - start)
            stream.state = state
            stream.position += stop - start
            stream.digest.update(records[start:stop])
            self._follow_times(stream, times, slice(start, stop))
            if stream is not streams[-1]:
                self._write(stream)
        self._open = streams[-1]
        self.events += piece.height
        return self._table(piece, positions, packed)

    def _stream(self, name: str) -> _Stream:
        """The stream that the next rows are of: the one that is open, or a new one."""
        if self._open is not None:
            stream, self._open = self._open, None
            if stream.name == name:
                return stream
            self._write(stream)
        digest = hashlib.blake2b(digest_size=EPOCH_BYTES + TAG_BYTES)
        for part in (self._fingerprint, self._job.plan.model.encode(), name.encode()):
            digest.update(len(part).to_bytes(4, "little") + part)
        return _Stream(name, self._layout.initial(), digest)

    def _run(
        self, streams: list[_Stream], columns: EventColumns, starts: list[int], stops: list[int]
    ) -> tuple[FloatArray, list[State]]:
        parts = [
            OrderedEvents(each.name, columns[start:stop], each.state, each.position)
            for each, start, stop in zip(streams, starts, stops, strict=True)
        ]
        outputs, states = self._runner.run(parts, chunk=CHUNK, batch=BATCH)
        for part, output, state in zip(parts, outputs, states, strict=True):
            if not (np.isfinite(output).all() and np.isfinite(state.floats).all()):
                raise DataError(
                    expected=f"stream {part.name!r}: finite outputs and states",
                    got="NaN or infinity",
                )
        return np.concatenate(outputs), states

    def _event_bytes(self, columns: EventColumns, piece: pl.DataFrame) -> BytesArray:
        """What the network sees of each event, uint8 [T, W]."""
        block = block_of(self._schema, columns)
        parts = [np.ascontiguousarray(block.numbers.T).view(np.uint8)]
        if block.times_ms is not None:
            parts.append(block.times_ms.astype("<i8").reshape(-1, 1).view(np.uint8))
        if "reset" in piece.columns:
            parts.append(piece["reset"].fill_null(False).to_numpy().astype(np.uint8)[:, np.newaxis])
        return np.ascontiguousarray(np.concatenate(parts, axis=1))

    def _follow_times(self, stream: _Stream, times: EventTimes | None, cut: slice) -> None:
        if times is None:
            return
        own = times.times_ms[cut][times.present[cut]]
        if own.size:
            latest = np.maximum.accumulate(np.concatenate(([stream.latest_ms], own)))
            self.out_of_order += int(np.count_nonzero(own < latest[:-1]))
            stream.latest_ms, stream.last_ms = int(latest[-1]), int(own[-1])

    def _write(self, stream: _Stream) -> None:
        """Write the state of a stream that has ended."""
        digest = stream.digest.digest()
        value = encode_state(
            StreamState(
                head=StreamHead(digest[:EPOCH_BYTES], digest[EPOCH_BYTES:], stream.position),
                feed=Feed.EVENTS,
                fingerprint=self._fingerprint,
                last=None,
                updated_ms=stream.last_ms,
                state=stream.state,
            )
        )
        self._records.append([self._job.plan.model, stream.name, value])
        self._size_bytes += len(value)
        self.streams += 1
        if self._size_bytes >= BLOCK_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._records:
            self._writer.write(self._records)
        self._records, self._size_bytes = [], 0

    def _table(
        self,
        piece: pl.DataFrame,
        positions: NDArray[np.int64],
        packed: FloatArray,
    ) -> pl.DataFrame:
        table: dict[str, Any] = {"stream": piece["stream"]}
        if self._schema.timestamp is not None:
            table["time"] = piece[self._schema.timestamp.name].cast(pl.Datetime("ms", "UTC"))
        table["position"] = positions
        for output in self._outputs.outputs:
            columns = self._outputs.by_name(packed)[output.name].reshape(piece.height, -1)
            table.update(zip(output.column_names(), map(pl.Series, columns.T), strict=True))
        return pl.DataFrame({**table, "file": piece["file"], "row": piece["row"]})
