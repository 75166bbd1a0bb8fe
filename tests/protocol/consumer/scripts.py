"""The rules of consumers, and the effects of their scripts on the store.

Whether a chunk is processed is decided by `service.core.delivery`, as for every other chunk. A
planted bug is `ConsumerRules` with a part replaced.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from msgspec.structs import replace

from models.spec.state import State
from service.core import delivery, values
from tests.protocol.consumer.state import Command, ConsumerScenario, Entry, Item, Output, Store
from tests.protocol.model import WRITTEN, stream_key
from tests.protocol.state import NOTHING, Version
from tests.support.streams import applied

Outcome = Literal["done", "conflict", "not_pending"]


@dataclass(frozen=True, slots=True)
class ConsumerRules:
    """Every decision of a consumer that is not the service's own."""

    fenced: frozenset[str] = frozenset({"recover", "read", "acknowledge", "commit"})
    has_unique_fences: bool = True  # else a counter in the store
    numbers_commits: bool = True  # a commit follows the one before it, or is rejected
    renewals_compare: bool = True  # the number of commits
    checks_pending: bool = True  # a commit writes only what is pending
    compares_state: bool = True
    compares_for_duplicates: bool = True  # against what they were evaluated
    recovers: bool = True  # an owner begins with the pending entries
    loses_after_repeats: bool = True  # the effect of a repeated command is unknown
    splits_duplicates: bool = True  # of a chunk only events before the position are duplicates
    acknowledges_first: bool = False  # before the commit
    retries_under_fence: bool = False  # a commit of unknown outcome
    skips_loaded: bool = True  # events that a loaded state contains
    waits_for_skips: bool = True  # a chunk is computed once those before it are acknowledged


class TopicCall(NamedTuple):
    """One call of a script, by an owner."""

    store: Store  # before it
    command: Command
    owner: int
    page: int  # entries that are read at once


class TopicEffect(NamedTuple):
    """What a call of a script left in the store, and its answer; None if it was rejected."""

    after: Store
    answer: Any


class ConsumerModel:
    """The chunks and versions of one exploration, each computed once; its calls of scripts are
    recorded, to be made on a real server."""

    def __init__(self, scenario: ConsumerScenario, rules: ConsumerRules):
        self.scenario, self.rules = scenario, rules
        self.calls: dict[TopicCall, TopicEffect] = {}
        self._versions: dict[Any, Version] = {}
        self.chunk, self.advance = cache(self._chunk), cache(self._advance)

    @cached_property
    def loaded(self) -> Version:
        """The state of the first events, as it is loaded from a history, with its source mark."""
        entries = tuple(Entry(each, 0) for each in self.scenario.events[: self.scenario.loaded])
        computed = self.advance(entries, NOTHING, 0).new
        head = replace(computed.head, epoch=b"loaded--")
        mark = values.SourceMark("events", len(entries))
        stream = computed.stream._replace(head=head, last=None, source=mark)
        version = Version(-1, stream)
        version.chunks = dict.fromkeys(computed.chunks, head)
        return version

    def record(self, before: Store, command: Command, owner: int, effect: TopicEffect) -> None:
        """Record a call of a script."""
        command = command._replace(is_repeated=False, is_abandoned=False)
        self.calls[TopicCall(before, command, owner, self.scenario.page)] = effect

    def _chunk(self, entries: tuple[Entry, ...]) -> values.Chunk:
        """The chunk of merged entries; its nonce is that of its entries."""
        operation = entries[0].operation
        rows = np.array([entry.operation.events for entry in entries], np.float32)
        steps = values.Steps(values.Feed.INPUTS, len(rows), rows=rows)
        nonce = repr([(*_numbers(entry),) for entry in entries]).encode()
        digest = delivery.chunk_digest(
            None, steps, b"" if operation.position is not None else nonce
        )
        return values.Chunk(stream_key(operation.stream), steps, digest, operation.position)

    def _advance(self, entries: tuple[Entry, ...], base: Version, fence: int) -> Item:
        """The commit of merged entries; a stream that it creates has an epoch of this attempt."""
        value = float(base.stream.state.floats[0]) if base.stream else 0.0
        start, outputs = base.head.position if base.head else 0, []
        for position, entry in enumerate(entries, start):
            value = value * 8 + entry.operation.events[0]
            outputs.append(Output(entry, position, value))
        state = State(np.array([value], np.float32), np.zeros(0, np.int64))
        new = applied(self.chunk(entries), base.stream, state, **WRITTEN)
        if base.stream is None:
            numbers = (fence, *_numbers(entries[0]))
            epoch = bytes(number + 1 for number in numbers).ljust(values.EPOCH_BYTES, b"\x01")
            new = new._replace(head=replace(new.head, epoch=epoch))
        history = (*base.chunks, *(entry.chunk_id for entry in entries))
        number = len(self._versions) + 1
        version = self._versions.setdefault((new.head, history), Version(number, new))
        version.chunks = dict.fromkeys(history, version.head)
        is_http = entries[0].operation.client
        return Item("chunk", entries, base, version, () if is_http else tuple(outputs))


def _numbers(entry: Entry) -> tuple[int, int, int]:
    return entry.operation.client, entry.operation.index, entry.number


def merge(entries: Sequence[Entry], limit: int) -> tuple[Entry, ...]:
    """The first entries that make one chunk: without positions, or with consecutive ones."""
    count = 1
    for one, two in pairwise(entries[:limit]):
        position, following = one.operation.position, two.operation.position
        if (None if position is None else position + 1) != following:
            break
        count += 1
    return tuple(entries[:count])


def is_rejected(command: Command, store: Store, rules: ConsumerRules) -> bool:
    """Whether a script does nothing: another fence, or not the next commit under it."""
    if command.kind in rules.fenced and command.fence != store.lease.fence:
        return True
    is_next = command.number == store.lease.number + 1
    return command.kind == "commit" and rules.numbers_commits and not is_next


def read_pending(store: Store, after: Sequence[Entry], count: int) -> tuple[Entry, ...]:
    """A page of the pending entries, behind an entry."""
    known = after and after[0] in store.topic
    start = store.topic.index(after[0]) + 1 if known else 0
    if after and not known:  # it was lost, and so its id is larger than those of entries before it
        start = sum(entry < after[0] for entry in store.topic)
    return tuple(entry for entry in store.pending if entry in store.topic[start:])[:count]


def deliver_new(store: Store, count: int) -> tuple[Store, tuple[Entry, ...]]:
    """`XREADGROUP ... >`: new entries become pending."""
    entries = store.topic[store.delivered : store.delivered + count]
    delivered, pending = store.delivered + len(entries), (*store.pending, *entries)
    return store._replace(delivered=delivered, pending=pending), entries


def acknowledge(store: Store, entries: Sequence[Entry]) -> Store:
    """`XACK`."""
    return store._replace(pending=tuple(e for e in store.pending if e not in entries))


def commit_item(store: Store, item: Item, rules: ConsumerRules) -> tuple[Store, Outcome]:
    """One item of a commit: compare the state, acknowledge, add the outputs, write the state."""
    stream = item.entries[0].stream
    stored = store.states[stream]
    compares = rules.compares_state if item.kind == "chunk" else rules.compares_for_duplicates
    if compares and stored.compared != item.base.compared:
        return store, "conflict"
    acknowledged = acknowledge(store, item.entries)
    is_pending = len(store.pending) - len(acknowledged.pending) == len(item.entries)
    if rules.checks_pending and not is_pending:
        return store, "not_pending"
    if item.kind == "chunk":
        acknowledged = write_state(acknowledged, stream, item.new)
    return acknowledged._replace(outputs=store.outputs + item.outputs), "done"


def write_state(store: Store, stream: int, new: Version) -> Store:
    """Write the state of a stream."""
    states = list(store.states)
    states[stream] = new
    return store._replace(states=tuple(states))


def next_fence(store: Store, used: int, rules: ConsumerRules) -> int:
    """The fence of an acquisition: a random one is none that is still in use anywhere."""
    return used + 1 if rules.has_unique_fences else store.lease.fence + 1
