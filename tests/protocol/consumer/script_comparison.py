"""Compare the model's calls of the scripts of topics with the shipped ones on a real server.

Each call of an exploration is made once more by the service's own `RedisTopics`, on a topic, a
group, a lease, states and outputs that hold before it what the model says. Afterwards its answer
and all of these must be the model's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from typing import Any, Final

import redis

from service.store.base import COMMITTED, Conflicted
from service.store.codec import encode_state, pack_head
from service.store.keys import KeySpace
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from service.store.topics import (
    CONSUMER,
    FIRST_PENDING,
    NEW,
    ChunkCommit,
    Destination,
    NewEntry,
    TopicItem,
    TopicKeys,
    Unclear,
    is_not_pending,
)
from tests.protocol.consumer.scripts import ConsumerModel, TopicCall
from tests.protocol.consumer.state import Entry, Item, Store
from tests.protocol.model import stream_key
from tests.protocol.script_comparison import ScriptMismatch
from tests.protocol.state import STREAMS, Version

KEYS: Final = TopicKeys.of("carry{p0000}:in:m", "carry{p0000}:out:m", "carry{p0000}:dead:m", "g")
SPACE: Final = KeySpace("carry", 1)
LEASE_S: Final = 600.0


async def compare_topic_calls(
    model: ConsumerModel, url: str, client: redis.Redis, most: int | None = None
) -> int:
    """Make the calls of an exploration on the server, or about `most` of them at equal distances;
    how many there were. Raises ScriptMismatch.

    The client of the same server reads behind the store; its keys are deleted.
    """
    calls = model.calls.items()
    step = 1 if most is None else max(1, len(calls) // most)
    store = RedisStore(StoreSettings(url, partitions=1, store_wait_s=60))
    client.flushdb()
    await store.start()
    count = 0
    try:
        for call, expected in islice(calls, 0, None, step):
            client.flushdb()
            _write(client, call.store)
            answer = await _make(store, call)
            after = _read(client)
            wanted = _describe(expected.after), _comparable(call, expected.answer)
            if (after, answer) != wanted:
                raise ScriptMismatch(
                    f"{call.command} on {call.store}: expected {wanted}, got {(after, answer)}"
                )
            count += 1
    finally:
        await store.close()
    return count


def _id(store: Store, entry: Entry) -> str:
    """The id of an entry: its place, or where it was before the store lost it."""
    if entry in store.topic:
        return f"{store.topic.index(entry) + 1}-1"
    return f"{sum(other < entry for other in store.topic)}-{5 + entry.operation.index}"


def _state(version: Version) -> bytes | None:
    return encode_state(version.stored) if version else None


def _write(client: redis.Redis, store: Store) -> None:
    """Write what is stored before a call."""
    pipe, lease = client.pipeline(), store.lease
    pipe.xgroup_create(KEYS.topic, KEYS.group, "0", mkstream=True)
    for entry in store.topic:
        pipe.xadd(KEYS.topic, {"event": str(entry)}, id=_id(store, entry))
    delivered = store.topic[: store.delivered]
    if delivered:
        pipe.xreadgroup(KEYS.group, CONSUMER, {KEYS.topic: NEW}, count=len(delivered))
    if done := [_id(store, entry) for entry in delivered if entry not in store.pending]:
        pipe.xack(KEYS.topic, KEYS.group, *done)
    if lease.fence:
        until = int((time.time() + LEASE_S) * 1000) if lease.is_held else 0
        fields = {"fence": lease.fence, "number": lease.number, "until": until}
        pipe.hset(KEYS.lease, mapping={**fields, "owner": f"consumer {lease.owner}"})
    for stream, version in enumerate(store.states):
        if version:
            name, _ = SPACE.pair(stream_key(stream))
            pipe.set(name, _state(version))
    for output in store.outputs:
        pipe.xadd(KEYS.outputs, {"output": str(output)})
    pipe.execute()


def _read(client: redis.Redis) -> Any:
    """What is stored after a call."""
    pipe = client.pipeline()
    pipe.xinfo_groups(KEYS.topic)
    pipe.xpending_range(KEYS.topic, KEYS.group, "-", "+", 100)
    pipe.hmget(KEYS.lease, "fence", "number", "until")
    pipe.xrange(KEYS.outputs)
    for stream in range(len(STREAMS)):
        pipe.get(SPACE.pair(stream_key(stream))[0])
    groups, pending, (fence, number, until), outputs, *states = pipe.execute()
    is_held = int(until or 0) > (time.time() + 1) * 1000
    return (
        groups[0]["last-delivered-id"].decode(),
        [each["message_id"].decode() for each in pending],
        (int(fence or 0), int(number or 0), is_held),
        [fields[b"output"].decode() for _, fields in outputs],
        states,
    )


def _describe(store: Store) -> Any:
    """What the model has stored after a call, as `_read` returns it."""
    lease = store.lease
    return (
        _id(store, store.topic[store.delivered - 1]) if store.delivered else "0-0",
        [_id(store, entry) for entry in store.pending],
        (lease.fence, lease.number, lease.is_held),
        [str(output) for output in store.outputs],
        [_state(version) for version in store.states],
    )


async def _make(redis_store: RedisStore, call: TopicCall) -> Any:
    topics, command, store = redis_store.topics, call.command, call.store
    fence = str(command.fence)
    if command.kind in ("acquire", "renew", "release"):
        owner = f"consumer {call.owner}"
        if command.kind == "acquire":
            return (await topics.acquire(KEYS, owner, fence, LEASE_S, "0")).is_held
        lease_s = LEASE_S if command.kind == "renew" else 0.0
        return (await topics.renew(KEYS, owner, fence, lease_s, command.number, b"")).is_held
    if command.kind == "commit":
        items = [_item(store, item) for item in command.items]
        results = await topics.commit(KEYS, fence, command.number, items)
        return results if isinstance(results, Unclear) else [_outcome(each) for each in results]
    after = NEW
    if command.kind == "recover":
        after = _id(store, command.after[0]) if command.after else FIRST_PENDING
    entries = await topics.read(KEYS, fence, after, call.page)
    return entries if isinstance(entries, Unclear) else [each.id.decode() for each in entries]


def _item(store: Store, item: Item) -> TopicItem:
    ids = [_id(store, entry).encode() for entry in item.entries]
    key, head = stream_key(item.entries[0].stream), item.base.head
    if item.kind == "duplicates":
        return TopicItem(ids, condition=(key, head))
    outputs = [NewEntry(Destination.OUTPUTS, ("output", str(each))) for each in item.outputs]
    return TopicItem(ids, outputs, ChunkCommit(key, pack_head(head), _state(item.new), b""))


def _outcome(result: Any) -> str:
    if result is COMMITTED:
        return "done"
    if isinstance(result, Conflicted):
        return "conflict"
    return "not_pending" if is_not_pending(result) else str(result)


def _comparable(call: TopicCall, answer: Any) -> Any:
    """The model's answer, as `_make` returns it."""
    command, lease = call.command, call.store.lease
    if answer is None:
        is_fenced = command.fence != lease.fence
        return Unclear.FENCED if is_fenced else Unclear.COMMIT_MISSING
    if command.kind in ("recover", "read"):
        entries: Sequence[Entry] = answer
        return [_id(call.store, entry) for entry in entries]
    return answer
