"""A producer: appends the events of its streams, a burst at a time, and retries blindly.

A burst is appended whole or not at all. Where its outcome is unknown it is appended again, and now
and then although it was acknowledged: events with positions are duplicates then, others are more
events. So what was produced is what the topics hold in the end, which `check` compares with what
was acknowledged.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import redis
from redis.exceptions import RedisClusterException

from tests.faults.stores import ERRORS
from tests.faults.topics.layout import Events, number_field, partition_of, topic

LONGEST_BURST: Final = 40
RETRIES, LATE_RETRIES = 0.05, 0.03
"""Shares of the bursts that are appended again at once, or after a later one."""

PAUSE_S: Final = 0.05
PAGE: Final = 1_000
PAGES_BEHIND: Final = 4

APPEND: Final = """
for at = 4, #ARGV do
  redis.call('XADD', KEYS[1], '*', 'stream', ARGV[1], 'event', ARGV[at],
    ARGV[2], string.format('%d', ARGV[3] + at - 4))
end
"""
UNAVAILABLE: Final = (redis.RedisError, RedisClusterException, *ERRORS)
Burst = tuple[str, int, int]
"""A stream, and the positions of the first event and behind the last."""


class Producer(threading.Thread):
    """Appends events until it is stopped.

    Args:
        connect: opens a client of the store.
        may_append: whether another burst may be appended now.

    Attributes:
        lock: held while a burst is appended; whoever takes it suspends the producer.
        appended: events that were acknowledged, not counting those of retries.
        acknowledged: the bursts that were acknowledged, each at which moment.
        told: of each stream, behind the last event that was acknowledged.
        seen: what happened, and how often.
    """

    def __init__(
        self,
        streams: Sequence[str],
        events: Events,
        connect: Callable[[], Any],
        may_append: Callable[[], bool],
        seed: int,
    ):
        super().__init__(daemon=True)
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.appended, self.seen = 0, Counter[str]()
        self.acknowledged: list[tuple[float, Burst]] = []
        self.told = dict.fromkeys(streams, 0)
        self._events, self._connect, self._may_append = events, connect, may_append
        self._random = random.Random(seed)
        self._client: Any = None

    def run(self) -> None:
        """Append bursts, until it is stopped."""
        earlier: list[Burst] = []
        while not self.stopped.is_set():
            if not self._may_append():
                self.stopped.wait(PAUSE_S)
                continue
            with self.lock:
                stream = self._random.choice(list(self.told))
                start = self.told[stream]
                burst = (stream, start, start + self._random.randint(1, LONGEST_BURST))
                if not self._append(burst):
                    continue
                self.told[stream] = burst[2]
                self.acknowledged.append((time.monotonic(), burst))
                self.appended += burst[2] - start
                earlier = [*earlier[-20:], burst]
                if self._random.random() < RETRIES:
                    self._append_again(burst)
                if self._random.random() < LATE_RETRIES:
                    self._append_again(self._random.choice(earlier))

    def find_positions(self) -> None:
        """Continue each stream behind its last event in its topic: the store may have lost some.
        Called while the lock is held and the store serves."""
        client = self._connect()
        for partition in set(map(partition_of, self.told)):
            of_topic = {stream for stream in self.told if partition_of(stream) == partition}
            for stream, last in _find_last(client, topic(partition), of_topic).items():
                lost = self.told[stream] - last - 1
                self.seen["events lost by the store, appended again"] += lost
                self.told[stream] = last + 1
        client.close()

    def _append_again(self, burst: Burst) -> None:
        # a burst that the store has lost since would leave a gap
        if burst[2] <= self.told[burst[0]]:
            self.seen["bursts appended again"] += self._append(burst)

    def _append(self, burst: Burst) -> bool:
        """Append a burst until it is acknowledged, or the producer is stopped; whether it was."""
        stream, start, end = burst
        rows = self._events.read(stream, start, end - start)
        arguments = [stream, number_field(stream), start, *map(str, rows.tolist())]
        name = topic(partition_of(stream))
        while not self.stopped.is_set():
            try:
                self._client = self._client or self._connect()
                self._client.eval(APPEND, 1, name, *arguments)
                return True
            except UNAVAILABLE:
                self.seen["bursts of unknown outcome"] += 1
                with suppress(*UNAVAILABLE, AttributeError):
                    self._client.close()
                self._client = None
                self.stopped.wait(PAUSE_S)
        return False


def _find_last(client: Any, name: str, streams: set[str]) -> dict[str, int]:
    """The number of each stream's last event in a topic; -1 without any."""
    last, before, remaining = dict.fromkeys(streams, -1), "+", PAGES_BEHIND
    while remaining and (entries := client.xrevrange(name, before, "-", PAGE)):
        # retries may be behind the events that they repeat
        remaining -= min(last.values()) >= 0
        for _, fields in entries:
            stream = fields[b"stream"].decode()
            if stream in streams:
                number = int(fields[number_field(stream).encode()])
                last[stream] = max(last[stream], number)
        before = f"({entries[-1][0].decode()}"
    return last
