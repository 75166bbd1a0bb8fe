"""Compare the model's script calls with the shipped scripts on a real server, key by key.

Every script call of an exploration is made once more by the service's own `RedisStore` with its
codec, on two keys of its own, which hold before it what the model says. Afterwards its outcome and
the bytes of both keys must be the model's, and what the call wrote must expire. Of a deletion,
which the store tries several times, a call is one try.
"""

import math
from typing import Any
from unittest.mock import patch

import redis

from service.core.values import StreamKey, Tombstone
from service.store.base import Committed, Conflicted
from service.store.codec import HEADER_BYTES, encode_state, encode_tombstone
from service.store.redis import redis_store
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.protocol.model import MODEL, Effect, Model, ScriptCall
from tests.protocol.state import Keys
from tests.support.streams import columns, encode_reply

STATE_TTL_MS, REPLY_TTL_MS, TOMBSTONE_TTL_MS = 3_600_000, 600_000, 300_000


class ScriptMismatch(Exception):
    """The server did something else than the model; says what, and in which call."""


async def compare_script_calls(model: Model, url: str, client: redis.Redis) -> int:
    """Make the calls of an exploration on the server; how many there were. Raises ScriptMismatch.

    The client of the same server reads behind the store; its keys are deleted.
    """
    ttls = {"idle_ttl_s": STATE_TTL_MS / 1000, "reply_ttl_s": REPLY_TTL_MS / 1000}
    settings = StoreSettings(url, tombstone_ttl_s=TOMBSTONE_TTL_MS / 1000, **ttls)
    store = RedisStore(settings)
    client.flushdb()
    await store.start()
    try:
        for number, (call, effect) in enumerate(model.calls.items()):
            key = StreamKey(MODEL, f"s{number}")
            names = settings.keys.pair(key)
            stored = zip(names, _encode(call.stored), strict=True)
            client.mset({"other": b"", **{name: value for name, value in stored if value}})
            outcome = await _make_call(call, key, store)
            pipe = client.pipeline(transaction=False).mget(names)
            for name in names:
                pipe.pttl(name)
            read, *ttls_ms = pipe.execute()
            _check_call(call, effect, outcome, tuple(read), ttls_ms)
    finally:
        await store.close()
    return len(model.calls)


async def _make_call(call: ScriptCall, key: StreamKey, store: RedisStore) -> Any:
    if call.script == "read":
        return tuple(value and value.head for value in await store.load_with_reply(key))
    if call.script == "commit":
        return (await store.commit(columns(call.commit(key))))[0]
    with patch.object(redis_store, "new_epoch", return_value=call.new.state.stored.head.epoch):
        return (await store._write_tombstones({key: call.condition}, math.inf))[key].value


def _check_call(
    call: ScriptCall, effect: Effect, outcome: Any, stored: tuple[Any, ...], ttls_ms: list[Any]
) -> None:
    """Compare one call's outcome, keys and lifetimes."""
    shown = f"{call.script} of {call.new.state} at {call.stored.state}, expected {call.expected}"
    if stored != _encode(effect.after):
        raise ScriptMismatch(f"{shown}: other bytes than the model's")
    if outcome != _expected_outcome(call, effect.done):
        raise ScriptMismatch(f"{shown}: {outcome}, not {_expected_outcome(call, effect.done)}")
    if call.script != "read" and effect.done:
        limits_ms = STATE_TTL_MS if call.script == "commit" else TOMBSTONE_TTL_MS, REPLY_TTL_MS
        for value, ttl_ms, limit_ms in zip(stored, ttls_ms, limits_ms, strict=True):
            if value is not None and not 0 < ttl_ms <= limit_ms:
                raise ScriptMismatch(f"{shown}: expires after {ttl_ms} ms")


def _expected_outcome(call: ScriptCall, done: bool) -> Any:
    head, reply = call.stored.state.head, call.stored.reply.reply
    if call.script == "read":
        return head, head and reply and reply.head
    if call.script == "commit":
        return Committed() if done else Conflicted(head)
    state, _ = _encode(call.stored)
    return [1] if done else [0, *([state[:HEADER_BYTES]] if state else [])]


def _encode(keys: Keys) -> tuple[bytes | None, bytes | None]:
    stored, reply = keys.state.stored, keys.reply.reply
    encode = encode_tombstone if isinstance(stored, Tombstone) else encode_state
    return stored and encode(stored), reply and encode_reply(reply)
