"""The cache of states: its size limit and LRU eviction."""

from __future__ import annotations

import numpy as np

from models.spec.state import State
from service.core.values import FIRST_TAG, Feed, StreamHead, StreamKey, StreamState
from service.pipeline.state_cache import OVERHEAD_BYTES, StateCache
from service.store.codec import EncodedStream
from tests.support.streams import cached

FLOATS = 64
SIZE_BYTES = OVERHEAD_BYTES + 4 * FLOATS


def key(name: str) -> StreamKey:
    return StreamKey("model", name)


def state(floats: int = FLOATS, committed_ms: int = 0) -> EncodedStream:
    values = State(np.zeros(floats, np.float32), np.zeros(0, np.int64))
    head = StreamHead(bytes(8), FIRST_TAG, 1)
    return cached(StreamState(head, Feed.INPUTS, bytes(16), None, committed_ms, values))


def kept(cache: StateCache, names: str) -> str:
    return "".join(name for name in names if cache.get(key(name)) is not None)


def test_the_least_recently_committed_stream_is_evicted_first() -> None:
    cache = StateCache(3 * SIZE_BYTES)
    for name in "abca":
        cache.put(key(name), state())
    assert cache.get(key("b")) is not None
    cache.put(key("d"), state())
    assert kept(cache, "abcd") == "acd"
    for number in range(100):
        cache.put(key(f"more{number}"), state())
    assert sum(cache.get(key(f"more{number}")) is not None for number in range(100)) == 3


def test_replacing_or_dropping_a_state_frees_its_bytes() -> None:
    cache = StateCache(3 * SIZE_BYTES)
    for _ in range(10):
        cache.put(key("a"), state())
        cache.put(key("gone"), state())
        cache.drop(key("gone"))
        cache.drop(key("never"))
    cache.put(key("b"), state())
    cache.put(key("c"), state())
    assert kept(cache, "abc") == "abc"
    cache.put(key("d"), state())
    assert kept(cache, "abcd") == "bcd"


def test_a_state_larger_than_the_cache_is_not_cached() -> None:
    cache = StateCache(SIZE_BYTES)
    cache.put(key("large"), state(FLOATS + 1))
    assert cache.get(key("large")) is None
    cache.put(key("a"), state())
    assert kept(cache, "a") == "a"


def test_states_of_idle_streams_are_dropped() -> None:
    cache = StateCache(3 * SIZE_BYTES)
    for time_ms, name in enumerate("abca"):
        cache.put(key(name), state(committed_ms=time_ms))
    cache.drop_older(2)
    assert kept(cache, "abc") == "ac"
    cache.drop_older(9)
    assert kept(cache, "abc") == ""
    cache.put(key("d"), state(3 * FLOATS))
    assert kept(cache, "d") == "d"
