"""LRU cache of the states of this worker's recent streams, which saves their load.

A cached state may be stale or not yet committed: the compare-and-set of the commit detects that,
and the chunk is then retried from the store. So the cache only ever provides the initial state of a
computation. Bounded in bytes.
"""

from __future__ import annotations

from collections import OrderedDict

from service.core.values import StreamKey, StreamState

OVERHEAD_BYTES = 1024
"""Memory of one entry besides its arrays: objects, keys, dictionary (944 by tracemalloc)."""


class StateCache:
    """Least-recently-used states, at most `max_bytes` of them; 0 keeps none."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[StreamKey, StreamState] = OrderedDict()

    def get(self, key: StreamKey) -> StreamState | None:
        """The cached state of a stream, or None."""
        state = self._entries.get(key)
        if state is not None:
            self._entries.move_to_end(key)
        return state

    def put(self, key: StreamKey, state: StreamState) -> None:
        """Cache a state whose commit has been sent; evicts the least recently used ones."""
        self.drop(key)
        self._entries[key] = state
        self._bytes += _size_bytes(state)
        while self._bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= _size_bytes(oldest)

    def drop(self, key: StreamKey) -> None:
        """Invalidate the cached state of a stream, if there is one."""
        state = self._entries.pop(key, None)
        if state is not None:
            self._bytes -= _size_bytes(state)


def _size_bytes(state: StreamState) -> int:
    return state.state.floats.nbytes + state.state.ints.nbytes + OVERHEAD_BYTES
