"""Generates random streams, commits and replies for tests of stores."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from models.spec.state import State
from service.core.delivery import last_chunk, next_head, next_tag
from service.core.values import (
    FIRST_TAG,
    Chunk,
    Feed,
    LastChunk,
    StoredReply,
    StreamHead,
    StreamKey,
    StreamState,
    Tombstone,
)
from service.store.base import CommitColumns, Committed, Loaded, Store, decode_stream, decode_value
from service.store.codec import (
    EncodedStream,
    decode_reply,
    encode_replies,
    encode_state,
    pack_head,
    unpack_head,
)


class Commit(NamedTuple):
    """One row of `CommitColumns` as values; None for the empty ones."""

    key: StreamKey
    expected: StreamHead | None
    new: StreamState
    reply: StoredReply | None


def encode_reply(reply: StoredReply) -> bytes:
    """One reply as it is stored."""
    return encode_replies([pack_head(reply.head)], [reply.outputs])[0]


def columns(*commits: Commit) -> CommitColumns:
    """Commits as the store takes them."""
    return CommitColumns(
        [commit.key for commit in commits],
        [pack_head(commit.expected) for commit in commits],
        [encode_state(commit.new) for commit in commits],
        [encode_reply(commit.reply) if commit.reply else b"" for commit in commits],
    )


def rows(commits: CommitColumns) -> list[Commit]:
    """The inverse of `columns`."""
    return [
        Commit(
            key,
            unpack_head(expected),
            decode_stream(state),
            decode_reply(reply) if reply else None,
        )
        for key, expected, state, reply in zip(
            commits.keys, commits.expected, commits.states, commits.replies, strict=True
        )
    ]


class Streams:
    """Generator of streams from a seed, which is printed to reproduce failures."""

    def __init__(self, seed: int = 20240611):
        print(f"seed {seed}")
        self._random = np.random.default_rng(seed)

    def bytes(self, count: int) -> bytes:
        """Random bytes."""
        return self._random.bytes(count)

    def begin(self, *, floats: int = 24, ints: int = 3, position: int = 0) -> StreamState:
        """A stream at the start of a new epoch, with a state that is not zero."""
        return StreamState(
            head=StreamHead(self.bytes(8), FIRST_TAG, position),
            feed=Feed.EVENTS if self._random.integers(2) else Feed.INPUTS,
            fingerprint=self.bytes(16),
            last=None,
            updated_ms=int(self._random.integers(1, 2**48)),
            state=self.state(floats, ints),
        )

    def after(self, before: StreamState, steps: int = 4) -> StreamState:
        """The stream after one more chunk."""
        digest = self.bytes(32)
        position = before.head.position
        return StreamState(
            head=StreamHead(
                before.head.epoch, next_tag(before.head.tag, position, digest), position + steps
            ),
            feed=before.feed,
            fingerprint=before.fingerprint,
            last=LastChunk(position, digest[:16]),
            updated_ms=before.updated_ms + 1,
            state=self.state(before.state.floats.size, before.state.ints.size),
        )

    def first(self, **sizes: int) -> StreamState:
        """A stream after its first chunk."""
        return self.after(self.begin(**sizes))

    def state(self, floats: int, ints: int) -> State:
        """Random values of the whole range."""
        return State(
            self._random.normal(size=floats).astype(np.float32),
            self._random.integers(-(2**63), 2**63 - 1, size=ints, dtype=np.int64),
        )

    def reply(self, stream: StreamState, steps: int = 4, outputs: int = 3) -> StoredReply:
        """The reply of the stream's last chunk."""
        values = self._random.normal(size=(steps, outputs)).astype(np.float32)
        return StoredReply(stream.head, values)

    def creation(self, key: StreamKey, **sizes: int) -> Commit:
        """The commit of a stream's first chunk, with its reply."""
        new = self.first(**sizes)
        return Commit(key, None, new, self.reply(new))

    def next(self, commit: Commit) -> Commit:
        """The commit that follows a commit."""
        new = self.after(commit.new)
        return Commit(commit.key, commit.new.head, new, self.reply(new))


def applied(
    chunk: Chunk, base: StreamState | None, state: State, *, fingerprint: bytes, now_ms: int
) -> StreamState:
    """The stream after a processed chunk."""
    head = base.head if base else None
    new, last = next_head(chunk, head), LastChunk(*last_chunk(chunk, head))
    return StreamState(new, chunk.steps.feed, fingerprint, last, now_ms, state)


def cached(stream: StreamState) -> EncodedStream:
    """The stream as a worker keeps it in memory."""
    return EncodedStream(stream.head, stream.feed, encode_state(stream))


def key(stream: str, model: str = "flights") -> StreamKey:
    """A stream's key."""
    return StreamKey(model, stream)


async def load(
    store: Store, keys: Sequence[StreamKey], deadline_s: float = math.inf
) -> list[Loaded]:
    """Load streams and decode them."""
    return list(map(decode_value, keys, await store.load(keys, deadline_s)))


async def absence(store: Store, key: StreamKey) -> StreamHead | None:
    """The head that a creation must expect: that of a tombstone, or None."""
    (found,) = await load(store, [key])
    assert found is None or isinstance(found, Tombstone)
    return found and found.head


def same_stream(found: Any, expected: StreamState) -> bool:
    """Whether two streams are equal in every field and every bit."""
    return (
        isinstance(found, StreamState)
        and found._replace(state=expected.state) == expected
        and found.state.floats.tobytes() == expected.state.floats.tobytes()
        and found.state.ints.tobytes() == expected.state.ints.tobytes()
        and found.state.floats.dtype == np.float32
        and found.state.ints.dtype == np.int64
    )


def same_reply(found: Any, expected: StoredReply) -> bool:
    """Whether two replies are equal in every bit."""
    return (
        isinstance(found, StoredReply)
        and found.head == expected.head
        and found.outputs.shape == expected.outputs.shape
        and found.outputs.tobytes() == expected.outputs.tobytes()
    )


OpenStore = Callable[..., Awaitable[Store]]
"""Opens a store on a test's server, by settings."""


async def committed(store: Store, *commits: Commit) -> None:
    """Commit, and assert that every commit is written."""
    assert await store.commit(columns(*commits)) == [Committed()] * len(commits)


async def assert_stored(store: Store, *commits: Commit) -> None:
    """Assert that each stream is where its commit left it, bit by bit."""
    found = await load(store, [commit.key for commit in commits])
    for state, commit in zip(found, commits, strict=True):
        assert same_stream(state, commit.new), (commit.key, state)


async def assert_replayable(store: Store, *commits: Commit) -> None:
    """Assert the same, and that each has the reply of its commit."""
    for commit in commits:
        state, reply = await store.load_with_reply(commit.key)
        assert same_stream(state, commit.new), (commit.key, state)
        assert same_reply(reply, commit.reply), commit.key
