"""A topic that this consumer owns: from entries to chunks, from replies to acknowledgements.

The rules are in `docs/decisions/consumers.md`. Each entry that was read and is not yet acknowledged
is in memory: its event waits for the chunk before it of its stream, or is in a chunk, or its
acknowledgement is being written. If it is not known what the store did with a call, all of it is
forgotten, and read again under a new fence (`lose`).

Use from one event loop: `run` once; the rest from the consumer, and from the batches of its chunks.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol

import msgspec
import structlog

from service.consumers.config import ConsumerConfig
from service.consumers.events import Event, EventReader
from service.consumers.outputs import Condition, OutputWriter, condition_of, dead_letter
from service.consumers.waiting import WaitingEvents
from service.core.errors import (
    AlreadyApplied,
    CarryError,
    InferenceTimeout,
    InternalError,
    InvalidInput,
    OutcomeUnknown,
    PositionBehind,
    PreviousFailed,
)
from service.core.values import Chunk, Reply, StreamHead, StreamKey
from service.store.base import COMMITTED, CommitColumns, CommitResult
from service.store.codec import decode_reply
from service.store.topics import (
    FIRST_PENDING,
    NEW,
    ChunkCommit,
    Entry,
    Ownership,
    TopicItem,
    TopicKeys,
    Topics,
    Unclear,
    id_before,
    is_not_pending,
)

MIN_READ: Final = 32
MAX_READ: Final = 512
"""Most entries of one read. The number doubles while there are more; no commit waits long behind a
read. A topic with few entries reserves little memory, so that many topics are read at a time."""

POLL_S: Final = 0.001
"""Shortest pause after a read that reached the end of a topic. The pause doubles with each read
without an entry, up to `longest_poll_s`, and is halved by each one with entries."""

RETRY_S: Final = 0.05
"""Pause before a topic is acquired again, doubled with each failure in a row up to 32 times."""

DEAD: Final = "dead_letters"
MAX_ATTEMPTS: Final = 3
"""How often an event that fails with an internal error is computed before it is rejected."""

OnReply = Callable[[Reply | CarryError], None]

log = structlog.get_logger(__name__)


class Queue(Protocol):
    """What the topics of a consumer share: memory for entries, and places in the batcher.

    Attributes:
        counts: events by result.
        longest_poll_s: longest pause between two reads of a topic without entries.
    """

    counts: Counter[str]
    longest_poll_s: float

    def acquire_pause_s(self, owner: str) -> float:
        """Longest pause between two attempts to acquire a topic of another owner."""

    async def reserve(self, most: int) -> int:
        """Wait until entries may be read; returns how many, which are reserved."""

    def release(self, count: int) -> None:
        """Free the memory of entries."""

    def add(self, topic: OwnedTopic, stream: str) -> None:
        """Let a stream submit a chunk as soon as the batcher has room."""

    def submit(self, topic: OwnedTopic, chunk: Chunk, on_result: OnReply) -> None:
        """Queue a chunk."""


class Submitted(msgspec.Struct, eq=False):
    """A chunk in the batcher, and its events."""

    events: Sequence[Event]
    chunk: Chunk


class OwnedTopic:
    """A topic that is assigned to this consumer, and which it owns while it has a `fence`.

    Args:
        owner: name of this consumer, unique among all processes.
        output_start: the position of the first output of a chunk, given the head after it.

    Attributes:
        fence: of the current acquisition; None if the topic is not owned.
    """

    def __init__(
        self,
        keys: TopicKeys,
        topics: Topics,
        queue: Queue,
        config: ConsumerConfig,
        reader: EventReader,
        writer: OutputWriter,
        *,
        owner: str,
        is_of_topic: Callable[[StreamKey], bool],
        output_start: Callable[[Chunk, StreamHead], int],
    ):
        self.keys = keys
        self.fence: str | None = None
        self._topics = topics
        self._queue = queue
        self._config = config
        self._reader = reader
        self._writer = writer
        self._owner = owner
        self._is_of_topic = is_of_topic
        self._output_start = output_start
        self._number = self._known_number = 0
        self._failures = 0
        self._is_releasing = False
        self._unacknowledged: dict[bytes, None] = {}
        self._last_read = b""
        self._waiting = WaitingEvents()
        self._submitted: dict[StreamKey, Submitted] = {}
        self._halted: set[str] = set()
        self._rejected: list[tuple[str, TopicItem]] = []
        self._writing: asyncio.Task[None] | None = None
        self._attempts: Counter[bytes] = Counter()

    # Ownership

    async def run(self) -> None:
        """Acquire the topic and process its entries until it is released; acquire it again whenever
        it is lost."""
        while not self._is_releasing:
            try:
                if not await self._acquire():
                    continue
                await self._read_pending()
                await self._read_new()
            except CarryError as error:
                self.lose(error.detail)
            await self._drain()
            if self.fence is not None:
                await self._release()
            elif self._failures:
                await asyncio.sleep(RETRY_S * 2 ** min(5, self._failures - 1))

    def release(self) -> None:
        """Stop reading; `run` ends once the submitted chunks are committed."""
        self._is_releasing = True

    async def _acquire(self) -> bool:
        """Try to acquire the topic; returns whether it is owned now."""
        fence = secrets.token_hex(8)
        lease_s, start = self._config.lease_s, "0" if self._config.start == "beginning" else "$"
        held = await self._topics.acquire(self.keys, self._owner, fence, lease_s, start)
        if not held.is_held:
            await asyncio.sleep(min(held.left_s, self._queue.acquire_pause_s(held.owner)))
            return False
        if held.has_new_group:
            log.info("group_created", topic=self.keys.topic, group=self.keys.group)
        if claimed := await self._topics.claim(self.keys):
            log.info("entries_claimed", topic=self.keys.topic, entries=claimed)
        if self._config.on_error == "halt":
            self._halted = await self._topics.halted(self.keys)
        self._number = self._known_number = 0
        self.fence = fence
        log.info("topic_acquired", topic=self.keys.topic, fence=fence)
        return True

    def lose(self, reason: str) -> None:
        """End the acquisition: the outcome of a call is unknown, or there is another owner. `run`
        acquires the topic again, unless another consumer has."""
        self._failures += 1
        self._queue.counts["losses"] += 1
        self.fence = None
        log.warning("topic_lost", topic=self.keys.topic, reason=reason)

    async def renew(self) -> None:
        """Renew the lease; lose the topic if it has another owner."""
        fence = self.fence
        if fence is None:
            return
        try:
            held = await self._lease(fence, self._config.lease_s)
        except CarryError:
            # the fence decides, also after the lease has expired
            return
        if not held.is_held and self.fence == fence:
            self.lose(Unclear.FENCED.value)

    async def _release(self) -> None:
        fence, self.fence = self.fence, None
        if fence is not None:
            try:
                await self._lease(fence, 0)
            except CarryError as error:
                log.warning("topic_not_released", topic=self.keys.topic, reason=error.detail)
                return
            log.info("topic_released", topic=self.keys.topic)

    async def _lease(self, fence: str, lease_s: float) -> Ownership:
        number, floor = self._known_number, self._floor()
        return await self._topics.renew(self.keys, self._owner, fence, lease_s, number, floor)

    def _floor(self) -> bytes:
        """An id up to which every entry is acknowledged; empty if none is known."""
        oldest = next(iter(self._unacknowledged), None)
        return self._last_read if oldest is None else id_before(oldest)

    async def _drain(self) -> None:
        """Wait until no chunk is in the batcher and no acknowledgement is being written; forget
        the events that wait."""
        self._queue.release(self._waiting.clear())
        while self._submitted or self._writing is not None:
            await asyncio.sleep(POLL_S)
            self._queue.release(self._waiting.clear())
        for _, item in self._rejected:
            self._queue.release(len(item.ids))
        self._rejected.clear()
        self._unacknowledged.clear()
        self._last_read = b""

    # Reading

    async def _read_pending(self) -> None:
        """Read the entries that earlier acquisitions left pending."""
        after = FIRST_PENDING
        while entries := (await self._read(after, MIN_READ))[0]:
            after = entries[-1].id.decode()

    async def _read_new(self) -> None:
        """Read new entries until the topic is released or lost. At its end, pause until the clock
        is at a multiple of the pause, so that one call reads many topics."""
        pause_s, most = POLL_S, MIN_READ
        while not self._is_releasing and self.fence is not None:
            entries, room = await self._read(NEW, most)
            if len(entries) == room:
                most = min(2 * most, MAX_READ)
            else:
                most = max(most // 2, MIN_READ)
                await asyncio.sleep(pause_s - time.monotonic() % pause_s)
            pause_s = max(POLL_S, pause_s / 2) if entries else 2 * pause_s
            pause_s = min(pause_s, self._queue.longest_poll_s)

    async def _read(self, after: str, most: int) -> tuple[Sequence[Entry], int]:
        """Read and accept entries, as many as there is memory for; returns them and that number."""
        room = await self._queue.reserve(most)
        entries: Sequence[Entry] = ()
        try:
            if (fence := self.fence) is not None and not self._is_releasing:
                read = await self._topics.read(self.keys, fence, after, room)
                if isinstance(read, Unclear):
                    self.lose(read.value)
                elif self.fence is not None:
                    entries = read
        finally:
            self._queue.release(room - len(entries))
        for entry in entries:
            self._accept(entry)
        return entries, room

    def _accept(self, entry: Entry) -> None:
        """Queue the event of an entry behind those of its stream, or reject it."""
        self._last_read = entry.id
        self._unacknowledged[entry.id] = None
        if entry.fields is None:
            # deleted before it was processed
            self._write("deleted", TopicItem([entry.id]))
            return
        try:
            event = self._reader.read(entry)
            if not self._is_of_topic(self._reader.key(event.stream)):
                raise InvalidInput(
                    f"stream {event.stream!r} belongs to the topic of another partition"
                )
            if event.stream in self._halted:
                raise _halts(event.stream)
        except CarryError as error:
            self._reject(entry.id, entry.fields, error, self._reader.stream(entry.fields))
            return
        is_first = self._waiting.add(event)
        if is_first and self._reader.key(event.stream) not in self._submitted:
            self._queue.add(self, event.stream)

    # Chunks

    def submit(self, stream: str) -> None:
        """Submit the next chunk of a stream, if events of it wait and none is in the batcher; a
        stream may have been queued twice, before and after the topic was lost."""
        while self.fence is not None and self._reader.key(stream) not in self._submitted:
            events = self._waiting.take(stream, self._reader.max_events)
            if not events:
                return
            try:
                chunk = self._reader.chunk(events)
            except CarryError as error:
                self._fail(events, error)
                continue
            submitted = Submitted(events, chunk)
            self._submitted[chunk.key] = submitted
            self._queue.submit(self, chunk, partial(self._finish, submitted))
            return

    async def commit(self, commits: CommitColumns, deadline_s: float) -> list[CommitResult]:
        """Commit chunks with their outputs and acknowledgements; see `Committer`."""
        fence, count = self.fence, len(commits.keys)
        if fence is None:
            return [OutcomeUnknown("the topic was lost before the commit")] * count
        items = []
        columns = (commits.keys, commits.expected, commits.states, commits.replies)
        for key, expected, state, reply in zip(*columns, strict=True):
            submitted, stored = self._submitted[key], decode_reply(reply)
            start = self._output_start(submitted.chunk, stored.head)
            chunk = ChunkCommit(key, expected, state, reply)
            outputs = self._writer.entries(start, stored.outputs)
            ids = [event.id for event in submitted.events]
            shared = self._writer.shared(key.stream, stored.head)
            items.append(TopicItem(ids, outputs, chunk, shared=shared))
        results = await self._commit(fence, items, deadline_s)
        return [OutcomeUnknown("the topic was lost")] * count if results is None else [*results]

    async def _commit(
        self, fence: str, items: Sequence[TopicItem], deadline_s: float
    ) -> Sequence[CommitResult] | None:
        """Commit items; None if the topic was lost."""
        self._number = number = self._number + 1
        results: Sequence[CommitResult] | None = None
        try:
            done = await self._topics.commit(self.keys, fence, number, items, deadline_s)
        except CarryError as error:
            reason = error.detail
        except Exception as error:  # a defect: nobody else would see it, and the entries would wait
            log.exception("commit_failed", topic=self.keys.topic)
            reason = repr(error)
        else:
            if isinstance(done, Unclear):
                reason = done.value
            else:
                results, reason = done, "".join(map(str, filter(is_not_pending, done)))
                if self.fence == fence:
                    self._known_number = number
        if reason and self.fence == fence:
            self.lose(reason)
        return results

    def _finish(self, submitted: Submitted, result: Reply | CarryError) -> None:
        """Process the result of a chunk."""
        chunk, events = submitted.chunk, submitted.events
        del self._submitted[chunk.key]
        is_committed = isinstance(result, Reply) and not result.replayed
        if is_committed:
            self._queue.counts["committed"] += len(events)
        if self.fence is None:
            self._queue.release(len(events))
            return
        stream = chunk.key.stream
        if is_committed:
            self._acknowledged([event.id for event in events])
        elif isinstance(result, CarryError):
            self._fail(events, result)
        else:
            self._drop_duplicates(events, (chunk.key, result.head))
        if self.fence is not None and stream in self._waiting:
            self._queue.add(self, stream)

    # Failures

    def _fail(self, events: Sequence[Event], error: CarryError) -> None:
        """Retry, divide, reject or drop the events of a chunk that failed, by its error."""
        first = events[0]
        if isinstance(error, AlreadyApplied):
            self._drop_duplicates(events, condition_of(self._reader.key(first.stream), error))
        elif isinstance(error, PositionBehind) and first.position is not None:
            at = min(len(events), max(1, error.facts["expected"] - first.position))
            self._drop_duplicates(events[:at], condition_of(self._reader.key(first.stream), error))
            self._waiting.put_back(events[at:])
        elif isinstance(error, InternalError | InferenceTimeout):
            self._attempts[first.id] += 1
            if self._attempts[first.id] < MAX_ATTEMPTS:
                self._queue.release(len(events))
                self.lose(error.detail)
            else:
                self._reject_or_divide(events, error)
        elif error.retryable or error.needs_position:
            self._queue.release(len(events))
            self.lose(error.detail)
        else:
            self._reject_or_divide(events, error)

    def _reject_or_divide(self, events: Sequence[Event], error: CarryError) -> None:
        if len(events) == 1:
            (event,) = events
            self._reject(event.id, event.fields, error, event.stream)
            return
        for event in events:
            event.is_alone = True
        self._waiting.put_back(events)

    def _reject(
        self, entry_id: bytes, fields: Sequence[bytes], error: CarryError, stream: str | None
    ) -> None:
        """Write a dead letter; with `on_error: halt`, halt its stream."""
        log.warning(
            "entry_rejected",
            topic=self.keys.topic,
            entry=entry_id.decode(),
            stream=stream,
            code=error.code,
            reason=error.detail,
        )
        letter = dead_letter(entry_id, fields, error, stream)
        if self._config.on_error == "continue" or stream is None:
            condition = condition_of(self._reader.key(stream or ""), error)
            self._write(DEAD, TopicItem([entry_id], [letter], condition=condition))
        elif stream in self._halted:
            # a replay may have resumed it: then the topic is lost, and read again
            self._write(DEAD, TopicItem([entry_id], [letter], halted=stream))
        else:
            condition = condition_of(self._reader.key(stream), error)
            self._write(DEAD, TopicItem([entry_id], [letter], condition=condition, halts=stream))
            self._halted.add(stream)
            for event in self._waiting.take_all(stream):
                self._reject(event.id, event.fields, _halts(stream), stream)

    def _drop_duplicates(self, events: Sequence[Event], condition: Condition | None) -> None:
        """Acknowledge events that were applied before; their outputs are written already."""
        ids = [event.id for event in events]
        self._write("duplicates", TopicItem(ids, condition=condition))

    # Acknowledgements

    def _write(self, kind: str, item: TopicItem) -> None:
        """Commit an item without a chunk soon, together with others.

        Args:
            kind: what it is counted as.
        """
        self._rejected.append((kind, item))
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_rejected())

    async def _write_rejected(self) -> None:
        try:
            while self._rejected and self.fence is not None:
                rejected, self._rejected = self._rejected, []
                deadline_s = time.monotonic() + self._config.lease_s
                items = [item for _, item in rejected]
                results = await self._commit(self.fence, items, deadline_s)
                for at, (kind, item) in enumerate(rejected):
                    if results is not None and results[at] is COMMITTED:
                        self._queue.counts[kind] += len(item.ids)
                        self._acknowledged(item.ids)
                    else:
                        self._queue.release(len(item.ids))
                        if results is not None and self.fence is not None:
                            self.lose(str(results[at]))
        finally:
            self._writing = None

    def _acknowledged(self, ids: Sequence[bytes]) -> None:
        """Free the memory of entries that are acknowledged."""
        self._failures = 0
        for entry_id in ids:
            self._unacknowledged.pop(entry_id, None)
            if self._attempts:
                self._attempts.pop(entry_id, None)
        self._queue.release(len(ids))


def _halts(stream: str | None) -> PreviousFailed:
    return PreviousFailed(f"stream {stream!r} halts after an event that failed")
