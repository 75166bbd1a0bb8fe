"""What a store lets its operator observe: reconnects, round-trip times, availability, streams.

The store counts here, and the worker reads it once a second (`service.telemetry.sampler`): so
nothing on a chunk's path knows of metrics.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple

MAX_ROUND_TRIPS: Final = 4096
"""Round-trip times that are kept until they are read; older ones are dropped."""


@dataclass(slots=True, eq=False)
class StoreTelemetry:
    """Counts of one store, of this process.

    Attributes:
        reconnects: connections for chunks that were opened again.
        round_trips_s: times between a write and the reply to its first command; at most one
            command of a connection is timed at once.
        is_up: whether the last check found that the store accepts commits.
        servers_up, servers_down: the primaries that accept commits, and the others.
        memory_ratio: share of its `maxmemory` that the fullest primary uses; 0 without a limit.
    """

    reconnects: int = 0
    round_trips_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_ROUND_TRIPS))
    is_up: bool = False
    servers_up: int = 0
    servers_down: int = 0
    memory_ratio: float = 0.0


class StreamCount(NamedTuple):
    """The streams of one model in the store, counted or estimated.

    Attributes:
        streams: streams that are stored.
        live: those of them with a commit in the last `LIVE_S` seconds.
        state_bytes: bytes of their states, without their names and the server's overhead.
    """

    streams: float = 0.0
    live: float = 0.0
    state_bytes: float = 0.0


LIVE_S: Final = 300
"""A stream is live for this long after a commit, in seconds."""
