"""Cache of the states of a worker's recent streams, which saves their load.

A cached state may be stale or not yet committed: the compare-and-set of the commit detects that,
and the chunk is then retried from the store. So the cache only ever provides the initial state of a
computation.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Final

from service.core.values import StreamKey
from service.store.codec import EncodedStream
from service.store.layout import HEADER_BYTES, StateHeader

OVERHEAD_BYTES: Final = 640
"""Memory of one entry besides the state's values: header, objects and dictionary (592 bytes by
tracemalloc, rounded up)."""


class StateCache:
    """Cache of states that evicts the least recently committed; use from one event loop.

    Args:
        max_bytes: bound on the memory of the states; 0 keeps none.

    Attributes:
        size_bytes: memory of the states.
        evictions: states that were evicted so far, by model.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self.size_bytes = 0
        self.evictions: Counter[str] = Counter()
        self._entries: OrderedDict[StreamKey, EncodedStream] = OrderedDict()

    def get(self, key: StreamKey) -> EncodedStream | None:
        """The cached state of a stream, or None."""
        return self._entries.get(key)

    def put(self, key: StreamKey, stream: EncodedStream) -> None:
        """Cache a stream whose commit has been sent; evicts others if there is no room."""
        entries = self._entries
        replaced = entries.pop(key, None)
        entries[key] = stream
        if replaced is None:
            self.size_bytes += _size_bytes(stream)
        else:
            self.size_bytes += len(stream.value) - len(replaced.value)
        while self.size_bytes > self._max_bytes:
            evicted, oldest = entries.popitem(last=False)
            self.size_bytes -= _size_bytes(oldest)
            self.evictions[evicted.model] += 1

    def drop(self, key: StreamKey) -> None:
        """Invalidate the cached state of a stream, if there is one."""
        dropped = self._entries.pop(key, None)
        if dropped is not None:
            self.size_bytes -= _size_bytes(dropped)

    def drop_older(self, committed_ms: int) -> None:
        """Drop the states of streams that this worker has last committed before then."""
        while self._entries:
            key, oldest = next(iter(self._entries.items()))
            if StateHeader.decode(oldest.value).updated_ms >= committed_ms:
                return
            self.drop(key)


def _size_bytes(stream: EncodedStream) -> int:
    return OVERHEAD_BYTES - HEADER_BYTES + len(stream.value)
