"""Compare the model's script calls with the shipped scripts on a real server, key by key.

Every script call of an exploration is made once more by the service's own `RedisStore` with its
codec: many calls in one round trip, each on two keys of its own, which hold before it what the
model says. Afterwards its outcome and the bytes of both keys must be the model's, and what the
call wrote must expire. Of a deletion, which the store tries several times, a call is one try.
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
from tests.protocol.values import MODEL, ScriptCall, Values
from tests.protocol.world import STREAMS

BATCH: Final = 400
IDLE_TTL_MS: Final = 3_600_000
REPLY_TTL_MS: Final = 600_000
TOMBSTONE_TTL_MS: Final = 300_000


class ScriptMismatch(Exception):
    """The server did something else than the model; says what, and in which call."""


async def compare_script_calls(values: Values, url: str, client: redis.Redis) -> int:
    """Make the calls of an exploration on the server; how many there were.

    Args:
        client: of the same server, for reading behind the store.

    Raises:
        ScriptMismatch
    """
    lifetimes = {
        "idle_ttl_ms": IDLE_TTL_MS,
        "reply_ttl_ms": REPLY_TTL_MS,
        "tombstone_ttl_ms": TOMBSTONE_TTL_MS,
    }
    settings = StoreSettings(url, **lifetimes)
    store, calls = RedisStore(settings), [*values.calls]
    await store.start()
    try:
        for first in range(0, len(calls), BATCH):
            batch = calls[first : first + BATCH]
            streams = [StreamKey(MODEL, f"{STREAMS[c.stream]}{i}") for i, c in enumerate(batch)]
            pairs = [settings.keys.pair(stream) for stream in streams]
            client.flushdb()
            pipe = client.pipeline(transaction=False)
            for call, pair in zip(batch, pairs, strict=True):
                for name, value in zip(pair, _encode(values, call.state, call.reply), strict=True):
                    if value is not None:
                        pipe.set(name, value)
            pipe.execute()
            outcomes = await _make_calls(values, batch, streams, store)
            for call, pair, outcome in zip(batch, pairs, outcomes, strict=True):
                for name in pair:
                    pipe.get(name)
                    pipe.pttl(name)
                _check_call(values, call, outcome, pipe.execute())
    finally:
        await store.close()
    return len(calls)


def _check_call(values: Values, call: ScriptCall, outcome: Any, stored: Sequence[Any]) -> None:
    """Compare one call's outcome, keys and lifetimes: `[state, its ms, reply, its ms]`."""
    shown = f"{call.kind} of {call.new} which expects {call.expected}, where {call.state} is stored"
    expected = _encode(values, call.after_state, call.after_reply)
    if tuple(stored[::2]) != expected:
        raise ScriptMismatch(f"{shown}: other bytes than the model's")
    if outcome != _expected_outcome(values, call):
        raise ScriptMismatch(f"{shown}: {outcome}, not {_expected_outcome(values, call)}")
    if call.kind != "read" and call.done:
        limits = (IDLE_TTL_MS if call.kind == "commit" else TOMBSTONE_TTL_MS, REPLY_TTL_MS)
        for value, ttl_ms, limit_ms in zip(expected, stored[1::2], limits, strict=True):
            if value is not None and not 0 < ttl_ms <= limit_ms:
                raise ScriptMismatch(f"{shown}: expires after {ttl_ms} ms")


async def _make_calls(
    values: Values, calls: Sequence[ScriptCall], streams: Sequence[StreamKey], store: RedisStore
) -> list[Any]:
    """The outcome of every call: all commits in one batch, the others side by side."""
    commits, others = {}, {}
    for at, (call, stream) in enumerate(zip(calls, streams, strict=True)):
        new, expected = values.states[call.new], values.expected(call.expected)
        if call.kind == "commit":
            commits[at] = Commit(stream, expected, new, values.replies[call.new_reply])
        elif call.kind == "read":
            others[at] = store.load_with_reply(stream)
        else:
            condition = values.deletion_condition(call.kind, call.expected)
            others[at] = store._write_tombstone(stream, condition, new, None)
    outcomes: dict[int, Any] = {}
    outcomes |= zip(commits, await store.commit([*commits.values()]), strict=True)
    for at, answer in zip(others, await asyncio.gather(*others.values()), strict=True):
        is_read = calls[at].kind == "read"
        outcomes[at] = tuple(v and v.head for v in answer) if is_read else answer.value
    return [outcomes[at] for at in range(len(calls))]


def _expected_outcome(values: Values, call: ScriptCall) -> Any:
    head = values.head(call.state)
    if call.kind == "read":
        reply = values.replies[call.reply] if head else None
        return head, reply and reply.head
    if call.kind == "commit":
        return Committed() if call.done else Conflicted(head)
    state, _ = _encode(values, call.state, 0)
    return [1] if call.done else [0, *([state[:HEADER_BYTES]] if state else [])]


def _encode(values: Values, state: int, reply: int) -> tuple[bytes | None, bytes | None]:
    stream, stored = values.states[state], values.replies[reply]
    encode = encode_tombstone if isinstance(stream, Tombstone) else encode_state
    return (
        None if stream is None else encode(stream),
        None if stored is None else encode_reply(stored),
    )
