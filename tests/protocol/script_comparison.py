"""Compare the model's script calls with the shipped scripts on a real server, key by key.

Every script call of an exploration is made once more by the service's own `RedisStore` with its
codec, on keys of its own, which hold before it what the model says. Afterwards its outcome and the
contents of all keys must be the model's, and what the call wrote must expire. Of a deletion, which
the store tries several times, a call is one try.
"""

import math
import struct
from typing import Any
from unittest.mock import patch

import redis
from msgspec.structs import replace

from service.core.values import StreamKey, Tombstone
from service.store.base import Committed, Conflicted
from service.store.codec import encode_state, encode_tombstone, pack_head
from service.store.history import HistoryColumns, HistoryCopy
from service.store.layout import HEADER_BYTES
from service.store.redis import redis_store
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.protocol import histories
from tests.protocol.model import MODEL, Effect, Model, ScriptCall
from tests.protocol.state import FINGERPRINTS, Keys, Scenario
from tests.support.streams import columns, encode_reply

STATE_TTL_MS, REPLY_TTL_MS, TOMBSTONE_TTL_MS = 3_600_000, 600_000, 300_000
TAG_BYTES = 8  # of the tag before a chunk that an entry begins with


class ScriptMismatch(Exception):
    """The server did something else than the model; says what, and in which call."""


async def compare_script_calls(model: Model, url: str, client: redis.Redis) -> int:
    """Make the calls of an exploration on the server; how many there were. Raises ScriptMismatch.

    The client of the same server reads behind the store; its keys are deleted.
    """
    ttls = {"idle_ttl_s": STATE_TTL_MS / 1000, "reply_ttl_s": REPLY_TTL_MS / 1000}
    tombstone_ttl_s = TOMBSTONE_TTL_MS / 1000
    settings = StoreSettings(url, tombstone_ttl_s=tombstone_ttl_s, store_wait_s=60, **ttls)
    store = RedisStore(settings)
    client.flushdb()
    await store.start()
    try:
        for number, (call, effect) in enumerate(model.calls.items()):
            key = StreamKey(MODEL, f"s{number}")
            names = settings.keys.all_of(key)
            _write_keys(client, names, call.stored)
            outcome = await _make_call(model.scenario, call, key, store)
            pipe = client.pipeline(transaction=False).mget(names[:2])
            pipe.lrange(names[2], 0, -1).hgetall(names[3])
            for name in names:
                pipe.pttl(name)
            *stored, ttl_ms, reply_ttl_ms, _, history_ttl_ms = pipe.execute()
            _check_call(call, effect, outcome, stored, [ttl_ms, reply_ttl_ms, history_ttl_ms])
    finally:
        await store.close()
    return len(model.calls)


def _write_keys(client: redis.Redis, names: list[str], stored: Keys) -> None:
    """Let the keys of a stream hold what the model says."""
    values, entries, fields = _encode(stored)
    pipe = client.pipeline(transaction=False).set("other", b"")
    for name, value in zip(names, values, strict=False):
        if value:
            pipe.set(name, value)
    if entries:
        pipe.rpush(names[2], *entries)
    if fields:
        pipe.hset(names[3], mapping=fields)
    pipe.execute()


async def _make_call(
    scenario: Scenario, call: ScriptCall, key: StreamKey, store: RedisStore
) -> Any:
    new, history = call.new.state, call.new.history
    if call.script == "read":
        return tuple(value and value.head for value in await store.load_with_reply(key))
    if call.script == "read history":
        fingerprint = FINGERPRINTS[call.artifact]
        return await store.histories.read(key, fingerprint, call.position)
    if call.script == "shadow":
        return await store.histories.commit_versions([key], [encode_state(new.stored)])
    if call.script.startswith("delete"):
        with patch.object(redis_store, "new_epoch", return_value=new.stored.head.epoch):
            return (await store._write_tombstones({key: call.condition}, math.inf))[key].value
    entries = [histories.encode_entry(entry) for entry in history.entries]
    if call.script == "rewind":
        expected, state = pack_head(call.expected.stored.head), encode_state(new.stored)
        history_copy = HistoryCopy(entries)
        return await store.histories.write(key, expected, state, history_copy, keeps_snapshots=True)
    commits = columns(call.commit(key))
    if call.script == "copy" and history.head:
        snapshots = [encode_state(each.stored) for each in history.snapshots]
        copy = HistoryCopy(entries, snapshots)
        [expected], [state], [reply] = commits.expected, commits.states, commits.replies
        return await store.histories.write(key, expected, state, copy, reply=reply)
    if call.entry is not None:
        most = scenario.max_events, scenario.max_snapshots
        kept = HistoryColumns([histories.encode_entry(call.entry)], *most)
        commits = replace(commits, histories=kept)
    return (await store.commit(commits))[0]


def _check_call(
    call: ScriptCall, effect: Effect, outcome: Any, stored: list[Any], ttls_ms: list[Any]
) -> None:
    """Compare one call's outcome, keys and lifetimes."""
    shown = f"{call.script} of {call.new.state} at {call.stored.state}, expected {call.expected}"
    expected = _encode(effect.after)
    if (tuple(stored[0]), *stored[1:]) != expected:
        raise ScriptMismatch(f"{shown}: {stored}, not the model's {expected}")
    if outcome != _expected_outcome(call, effect.done):
        raise ScriptMismatch(f"{shown}: {outcome}, not {_expected_outcome(call, effect.done)}")
    if not call.script.startswith("read") and call.script != "shadow" and effect.done:
        has_history = histories.is_valid(effect.after)
        limit_ms = TOMBSTONE_TTL_MS if call.script.startswith("delete") else STATE_TTL_MS
        limits_ms = limit_ms, REPLY_TTL_MS, STATE_TTL_MS
        values = (*stored[0], has_history or None)
        for value, ttl_ms, limit_ms in zip(values, ttls_ms, limits_ms, strict=True):
            if value is not None and not 0 < ttl_ms <= limit_ms:
                raise ScriptMismatch(f"{shown}: expires after {ttl_ms} ms")


def _expected_outcome(call: ScriptCall, done: bool) -> Any:
    head, reply = call.stored.state.head, call.stored.reply.reply
    if call.script == "read":
        return head, head and reply and reply.head
    if call.script == "read history":
        return histories.read(call.stored, call.artifact, call.position).encode()
    if call.script == "shadow":
        return [done]
    if call.script in ("commit", "copy", "rewind"):
        return Committed() if done else Conflicted(head)
    [state, _], *_ = _encode(call.stored)
    return [1] if done else [0, *([state[:HEADER_BYTES]] if state else [])]


def _encode(keys: Keys) -> tuple[tuple[bytes | None, ...], list[bytes], dict[bytes, bytes]]:
    """The strings, the list and the hash that the keys of a stream hold."""
    stored, reply = keys.state.stored, keys.reply.reply
    encode = encode_tombstone if isinstance(stored, Tombstone) else encode_state
    head, entries, snapshots, states = keys.history
    fields, index = {}, b""
    for snapshot in snapshots:
        position = struct.pack("<Q", snapshot.head.position)
        index += position + FINGERPRINTS[snapshot.artifact][:8]
        fields[b"s" + position] = encode_state(snapshot.stored)
    for state in states:
        fields[b"v" + FINGERPRINTS[state.artifact]] = encode_state(state.stored)
    if head:
        fields[b"head"] = head + index
    values = stored and encode(stored), reply and encode_reply(reply)
    return (
        values,
        [entry.tag[:TAG_BYTES] + histories.encode_entry(entry) for entry in entries],
        fields,
    )
