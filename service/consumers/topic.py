"""A topic of events: from entries to chunks, from replies to acknowledgements.

The rules are in `docs/decisions/consumers.md`. The event of an entry that is not yet acknowledged
waits for the chunk before it of its stream, or is in a chunk, or its acknowledgement is being
written.

Use from one event loop: `run` once; the rest from the consumer, and from the batches of its chunks.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol

import msgspec
import structlog

from service.consumers.config import ConsumerConfig
from service.consumers.events import Event, EventReader
from service.consumers.outputs import Condition, OutputWriter, condition_of, dead_letter
from service.consumers.shared_topics import LeasedTopic, SharedTopics
from service.consumers.waiting import WaitingEvents
from service.core.delivery import already_applied
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
from service.core.values import Chunk, Reply, SourceMark, StreamHead, StreamKey, StreamState
from service.store.base import CommitColumns, CommitResult
from service.store.codec import decode_reply
from service.store.topics import ChunkCommit, Entry, TopicItem, TopicKeys

DEAD: Final = "dead_letters"
SKIPPED: Final = "skipped"
MAX_ATTEMPTS: Final = 3
"""How often an event that fails with an internal error is computed before it is rejected."""

DRAIN_POLL_S: Final = 0.001

OnReply = Callable[[Reply | CarryError], None]

log = structlog.get_logger(__name__)


class Queue(Protocol):
    """The places in the batcher, which the topics of a consumer share."""

    def add(self, topic: OwnedTopic, stream: str) -> None:
        """Let a stream submit a chunk as soon as the batcher has room."""

    def submit(self, topic: OwnedTopic, chunk: Chunk, on_result: OnReply) -> None:
        """Queue a chunk."""


class Submitted(msgspec.Struct, eq=False):
    """A chunk in the batcher, and its events.

    Attributes:
        mark: the source mark of its stream, if that covers events of the chunk.
    """

    events: Sequence[Event]
    chunk: Chunk
    mark: SourceMark | None = None


class OwnedTopic(LeasedTopic):
    """A topic of events.

    Args:
        output_start: the position of the first output of a chunk, given the head after it.
    """

    def __init__(
        self,
        keys: TopicKeys,
        shared: SharedTopics[OwnedTopic],
        queue: Queue,
        config: ConsumerConfig,
        reader: EventReader,
        writer: OutputWriter,
        *,
        is_of_topic: Callable[[StreamKey], bool],
        output_start: Callable[[Chunk, StreamHead], int],
    ):
        super().__init__(keys, shared)
        self._queue = queue
        self._config = config
        self._reader = reader
        self._writer = writer
        self._is_of_topic = is_of_topic
        self._output_start = output_start
        self._waiting = WaitingEvents()
        self._submitted: dict[StreamKey, Submitted] = {}
        self._halted: set[str] = set()
        self._skipping: set[str] = set()
        self._rejected: list[tuple[str, TopicItem]] = []
        self._writing: asyncio.Task[None] | None = None
        self._attempts: Counter[bytes] = Counter()

    async def _prepare(self) -> None:
        if self._config.on_error == "halt":
            self._halted = await self._topics.halted(self.keys)

    async def _drain(self) -> None:
        """Wait until no chunk is in the batcher and no acknowledgement is being written; forget
        the events that wait."""
        self._shared.release(self._waiting.clear())
        while self._submitted or self._writing is not None:
            await asyncio.sleep(DRAIN_POLL_S)
            self._shared.release(self._waiting.clear())
        for _, item in self._rejected:
            self._shared.release(len(item.ids))
        self._rejected.clear()
        self._skipping.clear()
        await super()._drain()

    # Entries

    async def _process(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._accept(entry)

    def _accept(self, entry: Entry) -> None:
        """Queue the event of an entry behind those of its stream, or reject it."""
        if entry.fields is None:
            # deleted before it was processed
            self._write("deleted", TopicItem([entry.id]))
            return
        try:
            event = self._reader.read(entry)
            if not self._is_of_topic(self._reader.key(event.stream)):
                raise InvalidInput(
                    f"stream {event.stream!r} of model {self._config.model!r} belongs to the topic "
                    "of another partition: its producer has another model or number of partitions"
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
        """Submit the next chunk of a stream, if events of it wait and none is in the batcher or
        skipped; a stream may have been queued twice, before and after the topic was lost."""
        while (
            self.fence is not None
            and self._reader.key(stream) not in self._submitted
            and stream not in self._skipping
        ):
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

    def check_source(self, key: StreamKey, stored: StreamState) -> CarryError | None:
        """Check that no event of a chunk is in the state already; see `Committer`."""
        submitted, mark = self._submitted[key], stored.source
        if mark is None or not any(map(mark.covers, map(self._reader.find_mark, submitted.events))):
            return None
        submitted.mark = mark
        return already_applied(key.stream, stored.head)

    async def commit(self, commits: CommitColumns, deadline_s: float) -> list[CommitResult]:
        """Commit chunks with their outputs and acknowledgements; see `Committer`."""
        fence, count = self.fence, len(commits.keys)
        if fence is None:
            return [OutcomeUnknown("the topic was lost before the commit")] * count
        items = []
        columns = (commits.keys, commits.expected, commits.states, commits.replies)
        for at, (key, expected, state, reply) in enumerate(zip(*columns, strict=True)):
            submitted, stored = self._submitted[key], decode_reply(reply)
            start = self._output_start(submitted.chunk, stored.head)
            history = commits.histories and commits.histories.select([at])
            alarm = commits.alarms[at] if commits.alarms else ""
            chunk = ChunkCommit(key, expected, state, reply, history, alarm)
            outputs = self._writer.entries(start, stored.outputs, state)
            ids = [event.id for event in submitted.events]
            steps = submitted.chunk.steps.length
            shared = self._writer.shared(key.stream, stored.head, steps, state)
            items.append(TopicItem(ids, outputs, chunk, shared=shared))
        results = await self._commit(fence, items, deadline_s)
        return [OutcomeUnknown("the topic was lost")] * count if results is None else [*results]

    def _finish(self, submitted: Submitted, result: Reply | CarryError) -> None:
        """Process the result of a chunk."""
        chunk, events = submitted.chunk, submitted.events
        del self._submitted[chunk.key]
        is_committed = isinstance(result, Reply) and not result.replayed
        if is_committed:
            self._shared.counts["committed"] += len(events)
        if self.fence is None:
            self._shared.release(len(events))
            return
        stream = chunk.key.stream
        if is_committed:
            self._forget([event.id for event in events])
        elif submitted.mark is not None and isinstance(result, AlreadyApplied):
            self._skip(events, submitted.mark, condition_of(chunk.key, result))
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
                self._shared.release(len(events))
                self.lose(error.detail)
            else:
                self._reject_or_divide(events, error)
        elif error.retryable or error.needs_position:
            self._shared.release(len(events))
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
        letter = dead_letter(Entry(entry_id, fields), error.code, error.detail, stream)
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

    def _skip(self, events: Sequence[Event], mark: SourceMark, condition: Condition | None) -> None:
        """Acknowledge the events of a stream that its state contains already.

        Its other events wait until this is done: the commit of the next chunk drops the mark, and
        then nothing would say that these were in the state.
        """
        stream = events[0].stream
        waiting = [*events, *self._waiting.take_all(stream)]
        skipped = {event.id for event in waiting if mark.covers(self._reader.find_mark(event))}
        self._waiting.put_back([event for event in waiting if event.id not in skipped])
        self._skipping.add(stream)
        self._write(SKIPPED, TopicItem([*skipped], condition=condition))

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
                await self._acknowledge(rejected)
                for kind, item in rejected:
                    if kind == SKIPPED and item.condition is not None and self.fence is not None:
                        self._resume(item.condition[0].stream)
        finally:
            self._writing = None

    def _resume(self, stream: str) -> None:
        """Process the events of a stream behind those that were skipped."""
        self._skipping.discard(stream)
        if stream in self._waiting:
            self._queue.add(self, stream)

    def _forget(self, ids: Sequence[bytes]) -> None:
        super()._forget(ids)
        if self._attempts:
            for entry_id in ids:
                self._attempts.pop(entry_id, None)


def _halts(stream: str | None) -> PreviousFailed:
    return PreviousFailed(f"stream {stream!r} halts after an event that failed")
