"""The model's store held against the shipped scripts on a real server, key by key.

Every script call that an exploration made is made once more, by the service's own `RedisStore`
with its codec: many calls in one round trip, each on two keys of its own, which hold before it
what the model says. Afterwards its outcome and the bytes of both keys must be the model's, and
what the call wrote must have a lifetime. Of a deletion, which the store tries several times, a call
is one try.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import redis

from service.core.values import StreamKey, Tombstone
from service.store.base import Commit, Committed, Conflicted
from service.store.codec import HEADER_BYTES, encode_reply, encode_state, encode_tombstone
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.protocol.book import MODEL, Book, Call
from tests.protocol.world import STREAMS

AT_ONCE: Final = 400
IDLE_TTL_MS: Final = 3_600_000
REPLY_TTL_MS: Final = 600_000
TOMBSTONE_TTL_MS: Final = 300_000


class Different(Exception):
    """The server did something else than the model; says what, call by call."""


def settings(url: str) -> StoreSettings:
    """Settings under which all that is written expires."""
    return StoreSettings(
        url,
        idle_ttl_ms=IDLE_TTL_MS,
        reply_ttl_ms=REPLY_TTL_MS,
        tombstone_ttl_ms=TOMBSTONE_TTL_MS,
    )


async def compare(book: Book, calls: Sequence[Call], url: str, client: redis.Redis) -> int:
    """Make the calls on the server; how many there were.

    Args:
        client: of the same server, for looking behind the store.

    Raises:
        Different
    """
    store = RedisStore(settings(url))
    await store.start()
    try:
        for first in range(0, len(calls), AT_ONCE):
            await _compare(book, calls[first : first + AT_ONCE], store, client)
    finally:
        await store.close()
    return len(calls)


async def _compare(
    book: Book, calls: Sequence[Call], store: RedisStore, client: redis.Redis
) -> None:
    client.flushdb()
    streams = [StreamKey(MODEL, f"{STREAMS[c.stream]}{i}") for i, c in enumerate(calls)]
    space = settings("unix:///none").keys
    pipe = client.pipeline(transaction=False)
    for call, stream in zip(calls, streams, strict=True):
        for name, value in zip(
            space.pair(stream), _bytes(book, call.state, call.reply), strict=True
        ):
            if value is not None:
                pipe.set(name, value)
    pipe.execute()
    outcomes = await _make(book, calls, streams, store)
    names = [name for stream in streams for name in space.pair(stream)]
    values = client.mget(names)
    for name in names:
        pipe.pttl(name)
    lives = pipe.execute()
    for at, call in enumerate(calls):
        expected = _bytes(book, call.after_state, call.after_reply)
        if tuple(values[2 * at : 2 * at + 2]) != expected:
            raise Different(f"{_told(book, call)}: other bytes than the model's")
        if outcomes[at] != _outcome(book, call):
            raise Different(f"{_told(book, call)}: {outcomes[at]}, not {_outcome(book, call)}")
        if call.kind != "read" and call.done:
            limits = (IDLE_TTL_MS if call.kind == "commit" else TOMBSTONE_TTL_MS, REPLY_TTL_MS)
            for value, lives_ms, most_ms in zip(
                expected, lives[2 * at : 2 * at + 2], limits, strict=True
            ):
                if value is not None and not 0 < lives_ms <= most_ms:
                    raise Different(f"{_told(book, call)}: written to live for {lives_ms} ms")


async def _make(
    book: Book, calls: Sequence[Call], streams: Sequence[StreamKey], store: RedisStore
) -> list[Any]:
    """The outcome of every call: all commits in one, the others side by side."""
    commits, others = [], []
    for at, (call, stream) in enumerate(zip(calls, streams, strict=True)):
        if call.kind == "commit":
            expected = book.expected(call.expected)
            reply = book.replies[call.new_reply]
            commits.append((at, Commit(stream, expected, book.states[call.new], reply)))
        elif call.kind == "read":
            others.append((at, store.load_with_reply(stream)))
        else:
            condition = book.condition(call.expected, call.kind == "delete by epoch")
            tombstone = book.states[call.new]
            others.append((at, store._write_tombstone(stream, condition, tombstone, None)))
    outcomes: list[Any] = [None] * len(calls)
    results = await store.commit([commit for _, commit in commits])
    for (at, _), result in zip(commits, results, strict=True):
        outcomes[at] = result
    for (at, _), found in zip(others, await asyncio.gather(*(o for _, o in others)), strict=True):
        read = calls[at].kind == "read"
        outcomes[at] = tuple(v and v.head for v in found) if read else found.value
    return outcomes


def _outcome(book: Book, call: Call) -> Any:
    if call.kind == "read":
        reply = book.replies[call.reply] if book.stream(call.state) else None
        return book.head(call.state), reply and reply.head
    if call.kind != "commit":
        found, _ = _bytes(book, call.state, 0)
        return [1] if call.done else [0, *([found[:HEADER_BYTES]] if found else [])]
    return Committed() if call.done else Conflicted(book.head(call.state))


def _bytes(book: Book, state: int, reply: int) -> tuple[bytes | None, bytes | None]:
    found, kept = book.states[state], book.replies[reply]
    encode = encode_tombstone if isinstance(found, Tombstone) else encode_state
    return (
        None if found is None else encode(found),
        None if kept is None else encode_reply(kept),
    )


def _told(book: Book, call: Call) -> str:
    def at(state: int) -> str:
        return str(book.past(state)) if state else "nothing"

    return (
        f"{call.kind} of {at(call.new)} which expects {at(call.expected)}, "
        f"where {at(call.state)} is held"
    )
