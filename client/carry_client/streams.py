"""A stream without I/O: its head, delivery of chunks, and the answer to a rollback.

Every chunk is sent with its position, and with `If-Match` for the head that this client knows. So a
chunk is applied once, however often it is sent, and never to another history. One chunk is in
flight at a time. One task or thread at a time uses a stream.

If the service is back at an earlier head of this client's history (the store lost its last
writes), the events since then are sent again before the chunk: from a bounded buffer, or from the
caller's `replay_from`. Their replies are dropped, since they were returned before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from threading import Lock
from typing import Any, Final

from carry_client.calls import LOG, Attempts, Call, Emit, Session
from carry_client.chunks import Chunk, ChunkReader, replay_source, source_gap
from carry_client.errors import (
    AlreadyApplied,
    EpochMismatch,
    PositionAhead,
    PositionBehind,
    Problem,
    StateChanged,
    StreamDiverged,
    StreamExists,
    StreamNotFound,
    StreamRolledBack,
)
from carry_client.models import ModelCore
from carry_client.replies import (
    Forecast,
    Reply,
    StreamHistory,
    StreamInfo,
    StreamState,
    read_forecast,
    read_head,
    read_history,
    read_info,
    read_reply,
    read_state,
)
from carry_client.steps import body_member, is_sliceable, length, to_steps
from carry_client.types import AsyncReplayFrom, AsyncSource, Events, Head, Progress
from carry_client.wire import stream_path

REMEMBERED_HEADS: Final = 4096

OTHER_HEAD: Final = (StateChanged, PositionAhead, PositionBehind, EpochMismatch)
"""Rejections of a chunk because the stream is not where this client left it."""


class StreamCore:
    """One stream; see the module.

    Attributes:
        head: after the last reply; None before the first request.
        is_uncertain: the last chunk failed, and may be applied.
        retries, rollbacks: how often there was one.
    """

    def __init__(
        self,
        session: Session,
        model: ModelCore,
        name: str,
        *,
        saved: Head | None = None,
        save: Callable[[Head], None] | None = None,
        replay_from: AsyncReplayFrom | None = None,
        buffer_events: int = 10_000,
        false_alarms_per_day: float | None = None,
    ) -> None:
        """Nothing is requested yet.

        Args:
            saved: the head after the last reply that an earlier process received.
            save: called with the head after each reply.
            buffer_events: how many events are kept to be sent again.
        """
        self.session, self.model, self.name = session, model, name
        self.path = stream_path(model.name, name)
        self.head: Head | None = None
        self.retries = self.rollbacks = 0
        self._saved, self._save = saved, save
        self._replay_from, self._buffer_events = replay_from, buffer_events
        self._false_alarms_per_day = false_alarms_per_day
        self._heads: deque[Head] = deque(maxlen=REMEMBERED_HEADS)
        self._buffer: deque[Chunk] = deque()
        self._buffered = 0
        self._chunk_events: int | None = None
        self._resets: Sequence[int] = ()
        self._is_resending = self.is_uncertain = False
        self._lock = Lock()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Raise RuntimeError if chunks are being sent meanwhile: they would have one position."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"stream {self.name!r}: expected one send at a time, got a concurrent one from "
                "another thread or task; send its chunks one after another, or use other streams"
            )
        try:
            yield
        finally:
            self._lock.release()

    # The head

    def refresh(self) -> Call[Head]:
        """Read the head from the service and continue from there, whatever the history was."""
        head = yield from self._read_head()
        self._start_at(head)
        return head

    def known_head(self, *, needs_history: bool = True) -> Call[Head]:
        """The head, read from the service at first.

        Args:
            needs_history: events that the service lost since the saved head are sent again.

        Raises:
            StreamRolledBack, StreamDiverged: it is not a continuation of the saved head.
        """
        if self.head is None:
            saved, head = self._saved or Head(), (yield from self._read_head())
            if saved.epoch and head.epoch not in ("", saved.epoch):
                raise StreamDiverged("is not the saved one", self.name, saved, head)
            if needs_history and saved.epoch and saved.position > head.position:
                self._heads.append(saved)
                yield from self._resend(saved, head, saved.position)
            else:
                self._start_at(head)
            LOG.info("stream %r continues at %s", self.name, head)
        return self.head or Head()

    def _read_head(self) -> Call[Head]:
        try:
            return read_head((yield from self.session.request("GET", self.path)))
        except StreamNotFound:
            return Head()

    def _start_at(self, head: Head) -> None:
        """Continue from a head without a history."""
        self._heads.clear()
        self._forget_buffer()
        self._move(head)

    def _move(self, head: Head) -> None:
        self.head = head
        self._heads.append(head)
        if self._save is not None and not self._is_resending:
            self._save(head)

    # Chunks

    def send(
        self,
        events: Events,
        params: Mapping[str, str],
        *,
        is_final: bool,
        resets: Sequence[int] = (),
    ) -> Call[Reply]:
        """Send one chunk at the stream's position."""
        with self.in_use():
            head = yield from self.known_head()
            chunk = Chunk(head.position, to_steps(events), is_final, tuple(resets))
            return (yield from self.deliver(chunk, params))

    def dry_run(
        self, events: Events, params: Mapping[str, str], *, resets: Sequence[int]
    ) -> Call[Reply]:
        """The reply that the chunk would get; nothing is applied, and the head stays."""
        head = yield from self.known_head(needs_history=False)
        chunk = Chunk(head.position, to_steps(events), resets=tuple(resets))
        yield from self.model.check_rows(chunk.steps)
        document = yield from self.session.request(
            "POST",
            f"{self.path}/chunks",
            {"position": chunk.start, "dry_run": True, **self.member(chunk)},
            if_match=head.etag if head.epoch else None,
            params=params,
        )
        return (yield from self._read_reply(chunk, document, params))

    def deliver(self, chunk: Chunk, params: Mapping[str, str]) -> Call[Reply]:
        """Send a chunk until it is applied; the stream is at its start.

        Raises:
            AlreadyApplied: it was applied, and its outputs are lost; the stream is at its end.
            StreamRolledBack, StreamDiverged, Problem
            ValueError: rows of another width than the model's; nothing was sent.
        """
        yield from self.model.check_rows(chunk.steps)
        body = {"position": chunk.start, **self.member(chunk)}
        was_uncertain, self.is_uncertain = self.is_uncertain, True
        while True:
            attempts = Attempts(self.session)
            head = self.head or Head()
            try:
                document = yield from self.session.request(
                    "POST",
                    f"{self.path}/chunks",
                    body,
                    if_match=head.etag if head.epoch else None,
                    params=params,
                    attempts=attempts,
                )
            except OTHER_HEAD as problem:
                actual = problem.head
                self._check_rollback(problem, head, was_uncertain)
            except AlreadyApplied as problem:
                self.accept(chunk, problem.head)
                raise
            else:
                return (yield from self.accept_reply(chunk, document, params))
            finally:
                self.retries += attempts.retries
            yield from self._resend(head, actual, chunk.start)

    def member(self, chunk: Chunk) -> dict[str, Any]:
        """The members of a body that hold a chunk's events and options."""
        final = {"final": True} if chunk.is_final else {}
        resets = {"resets": list(chunk.resets)} if chunk.resets else {}
        rate = self._false_alarms_per_day
        alarms = {} if rate is None else {"false_alarms_per_day": rate}
        return {**body_member(chunk.steps, self.session.encoding), **final, **resets, **alarms}

    def accept_reply(self, chunk: Chunk, document: Any, params: Mapping[str, str]) -> Call[Reply]:
        """Read a chunk's reply and move to its head."""
        reply = yield from self._read_reply(chunk, document, params)
        if reply.position != chunk.end or reply.stream != self.name:
            detail = (
                f"expected stream {self.name!r} at position {chunk.end}, got stream "
                f"{reply.stream!r} at {reply.position}"
            )
            raise Problem(200, "unreadable_reply", detail)
        self.accept(chunk, reply.head)
        return reply

    def _read_reply(self, chunk: Chunk, document: Any, params: Mapping[str, str]) -> Call[Reply]:
        is_last_alone = params.get("return_sequences") == "false"
        description = yield from self.model.description(document)
        return read_reply(description, document, chunk.end - 1 if is_last_alone else chunk.start)

    def accept(self, chunk: Chunk, head: Head) -> None:
        """Move to the head after a chunk, and keep its events."""
        self.is_uncertain = False
        self._move(head)
        self._buffer.append(chunk)
        self._buffered += len(chunk.steps)
        while self._buffer and self._buffered > self._buffer_events:
            self._buffered -= len(self._buffer.popleft().steps)

    # Rollbacks

    def _check_rollback(self, problem: Problem, head: Head, was_uncertain: bool) -> None:
        """Raise unless the service is at an earlier head of this client's history."""
        actual = problem.head
        if actual == head:
            raise problem
        is_before_memory = actual.epoch == head.epoch and actual.position < self._heads[0].position
        if actual.epoch and actual not in self._heads and not is_before_memory:
            own = ", or by a send of this client that failed" if was_uncertain else ""
            detail = f"was changed by others{own}; refresh() accepts that"
            raise StreamDiverged(detail, self.name, head, actual) from problem

    def _resend(self, head: Head, actual: Head, stop: int) -> Call[None]:
        """Send the events from a rolled-back head up to a position again.

        If that fails, the stream expects `head` as before. So the next chunk is rejected again, and
        the rest is sent then; no chunk is ever sent in the place of a missing one.
        """
        kept = [chunk for chunk in self._buffer if actual.position <= chunk.start < stop]
        has_all = bool(kept) and kept[0].start == actual.position
        replay_from, was_resending = self._replay_from, self._is_resending
        buffer = list(self._buffer)
        self.rollbacks += 1
        LOG.warning("stream %r was rolled back from %s to %s", self.name, head, actual)
        try:
            if not has_all and replay_from is None:
                detail = "was rolled back, and its events are not kept"
                raise StreamRolledBack(detail, self.name, head, actual)
            self._is_resending = True
            self._forget_buffer(actual.position)
            self._move(actual)
            if has_all or replay_from is None:
                for chunk in kept:
                    yield from self._deliver_again(chunk)
            else:
                yield from self._replay(replay_from(actual.position), actual.position, stop)
        except BaseException:
            self.head = head
            self._buffer = deque(buffer)
            self._buffered = sum(len(chunk.steps) for chunk in buffer)
            raise
        finally:
            self._is_resending = was_resending

    def _replay(self, source: AsyncSource, start: int, stop: int) -> Call[None]:
        """Send the caller's events of start..stop-1."""
        size = yield from self.model.chunk_events(self._chunk_events)
        reader = ChunkReader(source, start, size, None, self.session.clock, self._resets)
        while start < stop:
            chunk = yield from reader.next_chunk(stop - start)
            if chunk is None:
                detail = f"was rolled back, and replay_from has no event {start}"
                raise StreamRolledBack(detail, self.name, Head(stop), Head(start))
            yield from self._deliver_again(chunk)
            start = chunk.end

    def _deliver_again(self, chunk: Chunk) -> Call[None]:
        with suppress(AlreadyApplied):
            yield from self.deliver(chunk, {})

    def _forget_buffer(self, position: int = 0) -> None:
        """Forget the chunks from a position on."""
        while self._buffer and self._buffer[-1].start >= position:
            self._buffered -= len(self._buffer.pop().steps)

    # Whole sources

    def send_all(
        self,
        source: AsyncSource,
        params: Mapping[str, str],
        *,
        chunk_events: int | None,
        linger_s: float | None,
        first_position: int | None,
        is_final: bool,
        resets: Sequence[int],
        progress: Callable[[Progress], None] | None,
    ) -> Call[None]:
        """Send a source in chunks; emits the reply of each."""
        # what the source itself has is not lost
        with self.in_use():
            head = yield from self.known_head(needs_history=first_position is None)
        if self.is_uncertain and first_position is not None:
            # the chunk that failed last may be applied, and the source may be cut elsewhere now
            latest = yield from self._read_head()
            if latest.epoch == (head.epoch or latest.epoch) and latest.position > head.position:
                self._move(latest)
        first = head.position if first_position is None else first_position
        self._check_gap(head, first)
        clock, began_s = self.session.clock, self.session.clock()
        total = first + length(source) if is_sliceable(source) else None
        own_replay, rollbacks, retries = self._replay_from, self.rollbacks, self.retries
        if own_replay is None and is_sliceable(source):
            self._replay_from = replay_source(source, first, self.name)
        self._chunk_events = chunk_events
        self._resets = sorted(first + reset for reset in resets)
        try:
            if head.position < first:
                yield from self._resend(Head(first), head, first)
            size = yield from self.model.chunk_events(chunk_events)
            with closing(ChunkReader(source, first, size, linger_s, clock, self._resets)) as reader:
                yield from reader.skip_to(self.head_position)
                chunks = skipped = 0
                while True:
                    chunk = yield from reader.next_chunk()
                    if chunk is None and not is_final:
                        return
                    is_final = is_final and chunk is not None
                    chunk = chunk or reader.end
                    try:
                        with self.in_use():
                            reply = yield from self.deliver(chunk, params)
                        yield Emit(reply)
                    except AlreadyApplied:
                        skipped += len(chunk.steps)
                        text = "stream %r: outputs of events %d to %d are lost with their reply"
                        LOG.warning(text, self.name, chunk.start, chunk.end - 1)
                    chunks += 1
                    if progress is not None:
                        counts = self.retries - retries, self.rollbacks - rollbacks, skipped
                        elapsed_s = clock() - began_s
                        progress(Progress(self.head_position, total, chunks, *counts, elapsed_s))
        finally:
            self._replay_from, self._chunk_events, self._resets = own_replay, None, ()

    def _check_gap(self, head: Head, first: int) -> None:
        """Raise if a source begins after the stream's position, so that events would be missing."""
        was_there = self._saved is not None and self._saved.position >= first
        if head.position < first and self._replay_from is None and not was_there:
            raise source_gap(self.name, head, first)

    @property
    def head_position(self) -> int:
        """The position; 0 while it is unknown."""
        return self.head.position if self.head is not None else 0

    # The other requests

    def info(self) -> Call[StreamInfo]:
        return read_info((yield from self.session.request("GET", self.path)))

    def forecast(
        self, horizon: int, *, samples: int, seed: int, future: Events | None
    ) -> Call[Forecast]:
        body: dict[str, Any] = {"horizon": horizon, "samples": samples, "seed": seed}
        if future is not None:
            body["future"] = to_steps(future)
        path = f"{self.path}/forecast"
        return read_forecast((yield from self.session.request("POST", path, body)))

    def state(self) -> Call[StreamState]:
        return read_state((yield from self.session.request("GET", f"{self.path}/state")))

    def restore(self, state: StreamState, *, overwrite: bool) -> Call[Head]:
        """Put a state in the stream's place, and continue from there."""
        body = {
            "fingerprint": state.fingerprint,
            "feed": state.feed,
            "position": state.head.position,
            "state": {name: values.tolist() for name, values in state.values.items()},
            **({} if state.since is None else {"since": state.since}),
        }
        path = f"{self.path}/state"
        yield from self.create("PUT", path, body, state.head.position, overwrite=overwrite)
        return (yield from self.refresh())

    def fork(self, to: StreamCore, *, overwrite: bool) -> Call[None]:
        """Create the stream `to` from this one's current state."""
        head = (yield from self.info()).head
        body = {"to": to.name}
        yield from to.create("POST", f"{self.path}/fork", body, head.position, overwrite=overwrite)
        yield from to.refresh()

    def create(
        self, method: str, path: str, body: Any, position: int, *, overwrite: bool
    ) -> Call[None]:
        """Create this stream at a position."""
        before = (yield from self.refresh()) if overwrite else Head()
        yield from self._replace(method, path, body, position, before)

    def _replace(
        self, method: str, path: str, body: Any, position: int, before: Head
    ) -> Call[Head]:
        """Replace this stream, which is at `before`, by one of a new epoch; returns its head.

        After a lost reply, a stream of a new epoch at that position without any commit is the one
        that was asked for.
        """
        attempts = Attempts(self.session)
        if_match = before.etag if before.epoch else None
        try:
            document = yield from self.session.request(
                method, path, body, if_match=if_match, attempts=attempts
            )
            return read_head(document)
        except (StreamExists, StateChanged) as problem:
            head = problem.head
            is_ours = head.position == position and not head.tag.strip("0")
            if not attempts.retries or not is_ours or head.epoch == before.epoch:
                raise
            return head

    def history(self, start: int, limit: int | None) -> Call[StreamHistory]:
        params = {"from": start} if limit is None else {"from": start, "limit": limit}
        document = yield from self.session.request("GET", f"{self.path}/history", params=params)
        return read_history(document)

    def rewind(self, position: int) -> Call[Head]:
        """Take the stream back to a position, and continue from there."""
        with self.in_use():
            head = yield from self.known_head(needs_history=False)
            body, path = {"position": position}, f"{self.path}/rewind"
            rewound = yield from self._replace("POST", path, body, position, head)
            self._start_at(rewound)
            return rewound

    def acknowledge(self, position: int | None) -> Call[bool]:
        """Close the open alarm; an If-Match with the head of before stays valid."""
        body = {} if position is None else {"position": position}
        path = f"{self.path}/acknowledge"
        document = yield from self.session.request("POST", path, body)
        return bool(document["closed"])

    def delete(self) -> Call[bool]:
        """Delete the stream; whether it existed."""
        attempts = Attempts(self.session)
        try:
            yield from self.session.request("DELETE", self.path, attempts=attempts)
            existed = True
        except StreamNotFound:
            # an earlier attempt may have deleted it
            existed = attempts.retries > 0
        self._start_at(Head())
        return existed
