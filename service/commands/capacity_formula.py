"""Capacity of a deployment: the memory and the processes that a number of streams needs.

The memory of a key is computed from the servers' own data structures, so it holds for every size:

- Valkey 9 as it is embedded (its allocator rounds up to 16 bytes): one object with the key in it,
  the value beside it or, if it is short, in it too, and a slot of the hash table.
- Redis with jemalloc: an object, an entry of the hash table, the key and the value, each rounded up
  to jemalloc's size classes, which are up to a quarter apart.

- A history on both: a list in blocks of 8 KiB, and a hash whose values are allocated one by one.

Memory of the server itself, of its clients and of its replication buffer is not included.
"""

from __future__ import annotations

import math
from typing import Final

from service.pipeline.state_cache import OVERHEAD_BYTES
from service.store.codec import REPLY_HEADER_BYTES
from service.store.layout import HEADER_BYTES

CHUNKS_PER_S: Final = 7_100
"""Chunks per second of a worker on one core (docs/reference/performance.md, standard workload)."""

STORE_CHUNKS_PER_S: Final = 35_000
"""Chunks per second of a store's server on one core, likewise: a fifth of it serves 7,100."""

UTILIZATION: Final = 0.5
"""Planned utilization of a process: the rest is headroom for bursts and failures."""

BLOCK_BYTES: Final = 8192
"""Most bytes of a block of a list, by the default of `list-max-listpack-size`."""

FIELD_BYTES: Final = 32
"""What a server has for each key and each field beside its bytes: the entry and its slot."""

REDIS_HASH_BYTES: Final = 160
"""What Redis has for a hash of few fields beside these: its table and its objects."""

COPY_FACTOR: Final = 2.0
"""Memory of a server, as a multiple of its data: copy-on-write during a rewrite of its file."""


def valkey_key_bytes(key: int, value: int, *, expires: bool) -> int:
    """Memory of a key and its value in the embedded Valkey."""
    return _malloc(16 + key + 3 + 8 * expires) + _malloc(_string(value)) + 12 + 12 * expires


def redis_key_bytes(key: int, value: int, *, expires: bool) -> int:
    """Memory of a key and its value in Redis with jemalloc."""
    entry = 24 + 12
    return _jemalloc(key + 4) + 16 + entry + _jemalloc(_string(value)) + (entry if expires else 0)


def _string(length: int) -> int:
    """A string as the servers store it: a header, which has two more bytes from 256 on, and NUL."""
    return length + (4 if length < 256 else 6)


def _malloc(size: int) -> int:
    """What glibc allocates for a request: a header of 8 bytes, in steps of 16."""
    return max(32, (size + 8 + 15) // 16 * 16)


def _jemalloc(size: int) -> int:
    """jemalloc's size class: multiples of 16 up to 128, then four classes between powers of two."""
    if size <= 128:
        return max(8, (size + 15) // 16 * 16)
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step


def stored_bytes(
    server: str,
    *,
    streams: int,
    state_bytes: int,
    key_bytes: int,
    replies: int = 0,
    reply_bytes: int = 0,
    idle_ttl: bool = False,
) -> int:
    """Memory of streams in a server.

    Args:
        server: `valkey` or `redis`.
        state_bytes: raw values of a state.
        key_bytes: average length of a key.
        replies: replies that are stored at a time.
        reply_bytes: outputs of one.
        idle_ttl: whether states have a lifetime.
    """
    measure = valkey_key_bytes if server == "valkey" else redis_key_bytes
    state = measure(key_bytes, HEADER_BYTES + state_bytes, expires=idle_ttl)
    reply = measure(key_bytes, REPLY_HEADER_BYTES + reply_bytes, expires=True)
    return streams * state + replies * reply


def history_bytes(
    server: str,
    *,
    key_bytes: int,
    entries: int,
    entry_bytes: int,
    snapshots: int,
    state_bytes: int,
) -> int:
    """Memory of the history of a stream in a server.

    Args:
        entries: chunks whose events are kept, of `entry_bytes` each as a list has them.
        snapshots: states that are kept, of `state_bytes` raw values each.
    """
    allocate, table = (_malloc, 0) if server == "valkey" else (_jemalloc, REDIS_HASH_BYTES)
    size = entry_bytes + (2 if entry_bytes < 64 else 4)
    in_block = max(1, BLOCK_BYTES // size)
    blocks = [in_block] * (entries // in_block) + [entries % in_block] * (entries % in_block > 0)
    events = sum(allocate(32) + allocate(count * size + 7) for count in blocks)
    snapshot = allocate(9 + 4) + allocate(_string(HEADER_BYTES + state_bytes)) + FIELD_BYTES
    head = allocate(_string(24 + 16 * snapshots)) + allocate(8) + FIELD_BYTES
    key = allocate(16 + key_bytes + 3) + FIELD_BYTES
    return events + snapshots * snapshot + head + 2 * key + table


def cache_bytes(streams: int, state_bytes: int) -> int:
    """Size of a worker's cache that holds every stream's state."""
    return streams * (state_bytes + OVERHEAD_BYTES)


def workers(chunks_per_s: float, chunks_per_core: float = CHUNKS_PER_S) -> int:
    """Workers, each on a core of its own."""
    return max(1, math.ceil(chunks_per_s / (chunks_per_core * UTILIZATION)))


def primaries(data_bytes: float, node_bytes: float, chunks_per_s: float) -> int:
    """Primaries of the store, by memory and by commits, whichever needs more."""
    by_memory = COPY_FACTOR * data_bytes / node_bytes
    by_commits = chunks_per_s / (STORE_CHUNKS_PER_S * UTILIZATION)
    return max(1, math.ceil(max(by_memory, by_commits)))
