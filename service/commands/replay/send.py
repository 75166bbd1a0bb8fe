"""Sends recorded events through a running service as live streams, one chunk of each in flight.

Events are read under the model's own schema (`models.events.frame`), so that what is sent is
exactly the schema's fields and what is verified afterwards are the same values. A stream's
events are ordered by the timestamp field; ties, and schemas without one, by the order of the rows.

It asks for every stream's position first, so that a second replay resumes where the first ended.
The Python client (`carry_client`) retries, and detects a stream at another position: behind (the
store lost commits) or ahead (its reply is no longer stored); the replay continues from there. A
reply that cannot be correct is counted as a fault, and the replay continues, so that one run shows
all of them.

Everything here runs in one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from carry_client import (
    AsyncModel,
    AsyncStream,
    CarryError,
    ModelDescription,
    Problem,
    Reply,
    StreamMoved,
)
from carry_client.errors import AlreadyApplied
from carry_client.steps import to_steps
from models.events.columns import EventColumns
from models.events.frame import columns_from_frame
from models.events.schema import EventSchema
from models.offline.steps import FloatArray
from models.offline.verification import ABSOLUTE, excess
from models.spec.stream_name import STREAM_NAME_RULE, is_stream_name
from service.core.errors import OperatorError


class ReplayError(OperatorError):
    """The replay cannot continue."""


@dataclass(frozen=True, slots=True)
class StreamEvents:
    """One stream's T events in their order, and their times: epoch milliseconds, or 0 without."""

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


@dataclass(slots=True)
class Tally:
    """Counts of one replay.

    Attributes:
        events: applied events; those that were sent again after the store lost them count twice.
        chunks: applied chunks.
        replayed: replies marked `replayed`.
        retries: failed attempts that were repeated, by error code.
        sent_again: events that the store had lost.
        skipped: events whose outputs were not received, because their stored reply had expired.
        faults: replies and positions that cannot be correct.
        latencies_s: of every answered chunk, with its retries.
    """

    events: int = 0
    chunks: int = 0
    replayed: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    sent_again: int = 0
    skipped: int = 0
    faults: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0


@dataclass(slots=True, eq=False)
class StreamReplay:
    """Position and outputs of one stream.

    Attributes:
        outputs: float32 [T, O], NaN if this run received none.
        position: how many of its events the service has consumed.
        start: its position before the replay.
    """

    events: StreamEvents
    client: AsyncStream
    outputs: FloatArray
    random: Random
    position: int = 0
    start: int = 0


class Replay:
    """One replay of a set of streams.

    Args:
        model: of a client whose deadline bounds the retries of one chunk.
        description: the model's.
        streams: the events to send.
        chunk: the least and the most events of a chunk, drawn uniformly between the two.
        seed: of the sizes; the same seed and stream give the same chunks.
        streams_in_flight: most streams with a chunk in flight at once.
        speed: times real time by the events' timestamps; None for as fast as possible.
        show: called with the number of events that the service has consumed.
    """

    def __init__(
        self,
        model: AsyncModel,
        description: ModelDescription,
        streams: Sequence[StreamEvents],
        *,
        chunk: tuple[int, int] = (1, 64),
        seed: int = 1,
        streams_in_flight: int = 64,
        speed: float | None = None,
        show: Callable[[int], None] = lambda events: None,
    ) -> None:
        self._description, self._chunk, self._speed = description, chunk, speed
        self._show = show
        self._slots = asyncio.Semaphore(streams_in_flight)
        self._start_s = 0.0
        self._first_ms = self._consumed = 0
        self.tally = Tally()
        # without a buffer the client raises instead of sending events again by itself, so that
        # the outputs of all that are sent again are seen
        self.streams = [
            StreamReplay(
                each,
                model.stream(each.name, buffer_events=0),
                np.full((len(each), description.width), np.nan, np.float32),
                Random(f"{seed} {each.name}"),  # noqa: S311
            )
            for each in streams
        ]

    async def run(self) -> None:
        """Send everything that is not consumed yet, and check the positions at the end.

        Raises:
            ReplayError: the service rejected a chunk, or was unavailable until the deadline.
        """
        with _counted_retries(self.tally.retries):
            await self._each(self._ask_start)
            waiting = [each for each in self.streams if each.position < len(each.events)]
            self._first_ms = min(
                (int(each.events.times_ms[each.position]) for each in waiting), default=0
            )
            self._start_s = time.monotonic()
            await self._each(self._send_all)
            self.tally.wall_s = time.monotonic() - self._start_s
            await self._each(self._check_position)

    async def _each(self, work: Callable[[StreamReplay], Coroutine[Any, Any, None]]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for stream in self.streams:
                    tasks.create_task(work(stream))
        except ExceptionGroup as group:
            raise group.exceptions[0] from group

    async def _ask_start(self, stream: StreamReplay) -> None:
        async with self._slots:
            stream.start = await self._refresh(stream)

    async def _check_position(self, stream: StreamReplay) -> None:
        async with self._slots:
            position, end = await self._refresh(stream), len(stream.events)
        if position != end:
            name = stream.events.name
            self.tally.faults.append(f"stream {name!r}: expected position {end}, got {position}")

    async def _send_all(self, stream: StreamReplay) -> None:
        end = len(stream.events)
        while stream.position < end:
            stop = min(stream.position + stream.random.randint(*self._chunk), end)
            if self._speed is not None:
                due_ms = int(stream.events.times_ms[stop - 1]) - self._first_ms
                due_s = self._start_s + due_ms / 1000 / self._speed
                await asyncio.sleep(due_s - time.monotonic())
            # a semaphore is fair: streams take turns
            async with self._slots:
                await self._send_chunk(stream, stop)

    async def _send_chunk(self, stream: StreamReplay, stop: int) -> None:
        """Send one chunk, check its reply, and move the stream."""
        tally, start = self.tally, stream.position
        chunk = f"stream {stream.events.name!r}, chunk at {start}: "
        sent_s = time.monotonic()
        try:
            reply = await stream.client.send(stream.events.events(start, stop))
        except (AlreadyApplied, StreamMoved) as error:
            unanswered: CarryError = error
        except Problem as problem:
            if problem.code != "unreadable_reply":
                raise _replay_error(problem, chunk) from problem
            tally.faults.append(f"{chunk}{problem.detail}")
            unanswered = problem
        else:
            tally.latencies_s.append(time.monotonic() - sent_s)
            self._store_outputs(stream, stop, reply, chunk)
            tally.replayed += reply.is_replayed
            tally.chunks += 1
            tally.events += stop - start
            self._move(stream, stop)
            return
        position = await self._refresh(stream)
        if position < start:
            tally.sent_again += start - position
        elif position == start and not isinstance(unanswered, StreamMoved):
            raise ReplayError(f"{chunk}expected a reply, got {unanswered}")
        else:
            tally.skipped += min(position, len(stream.events)) - start

    def _store_outputs(self, stream: StreamReplay, stop: int, reply: Reply, chunk: str) -> None:
        outputs = self._description.pack(reply.outputs, stop - stream.position)
        if not np.isfinite(outputs).all():
            self.tally.faults.append(f"{chunk}expected finite outputs")
        stored = stream.outputs[stream.position : stop]
        is_stored = ~np.isnan(stored).any(axis=1)
        if (excess(outputs[is_stored], stored[is_stored]) > ABSOLUTE).any():
            self.tally.faults.append(f"{chunk}other outputs than before for the same events")
        stored[:] = outputs

    async def _refresh(self, stream: StreamReplay) -> int:
        """Ask for a stream's position, and continue from there."""
        try:
            self._move(stream, (await stream.client.refresh()).position)
        except CarryError as error:
            raise _replay_error(error, f"stream {stream.events.name!r}: ") from error
        return stream.position

    def _move(self, stream: StreamReplay, position: int) -> None:
        end = len(stream.events)
        self._consumed += min(position, end) - min(stream.position, end)
        stream.position = position
        self._show(self._consumed)


def _replay_error(error: CarryError, what: str) -> ReplayError:
    """The error that ends a replay after the last attempt of a request."""
    if isinstance(error, Problem) and error.is_retryable:
        return ReplayError(f"{what}{error}; start again to resume from the streams' positions")
    return ReplayError(f"{what}the service rejected it: {error}")


@contextmanager
def _counted_retries(retries: Counter[str]) -> Iterator[None]:
    """Count the failed attempts that the client repeats and logs."""
    logger = logging.getLogger("carry_client")
    before = logger.level, logger.propagate
    handler = logging.Handler()

    def count(record: logging.LogRecord) -> None:
        code = getattr(record, "code", None)
        if code is not None:
            retries[code] += 1

    handler.emit = count  # type: ignore[method-assign]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.level, logger.propagate = before
        logger.removeHandler(handler)
