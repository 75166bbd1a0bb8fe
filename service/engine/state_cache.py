"""Recent states of this worker's streams, to skip their load.

A copy may be stale: the commit's compare-and-set finds that out, and the chunk is then done
again from the store. Nothing but the start of a computation is ever taken from here. Bounded
in bytes; the stream used longest ago leaves first.
"""

from __future__ import annotations

from collections import OrderedDict

from service.core.values import StreamKey, StreamState

OVERHEAD_BYTES = 1024
"""What one entry costs beside its arrays: objects, keys, the dictionary (944 by tracemalloc)."""


class StateCache:
    """Least-recently-used states, at most `max_bytes` of them; 0 keeps none."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[StreamKey, StreamState] = OrderedDict()

    def get(self, key: StreamKey) -> StreamState | None:
        """The copy, or None."""
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: StreamKey, state: StreamState) -> None:
        """Keep a state that was committed or loaded just now."""
        self.drop(key)
        self._entries[key] = state
        self._bytes += _size_bytes(state)
        while self._bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= _size_bytes(oldest)

    def drop(self, key: StreamKey) -> None:
        """Forget the copy, if there is one."""
        found = self._entries.pop(key, None)
        if found is not None:
            self._bytes -= _size_bytes(found)


def _size_bytes(state: StreamState) -> int:
    return state.state.floats.nbytes + state.state.ints.nbytes + OVERHEAD_BYTES
