"""A producer: appends the events of its streams, a burst at a time, and retries blindly.

A burst is appended whole or not at all. Where its outcome is unknown it is appended again, and now
and then although it was acknowledged: events with positions are duplicates then, others are more
events. So what was produced is what the topics hold in the end.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import redis
from redis.exceptions import RedisClusterException

from tests.faults.stores import ERRORS
from tests.faults.topics.layout import Events, has_positions, partition_of, topic

LONGEST_BURST: Final = 40
RETRIES, LATE_RETRIES = 0.05, 0.03
"""Shares of the bursts that are appended again at once, or after a later one."""

PAUSE_S: Final = 0.05
PAGE: Final = 1_000
PAGES_BEHIND: Final = 4

APPEND: Final = """
for at = 1, #ARGV, 3 do
  if ARGV[at + 2] == '' then
    redis.call('XADD', KEYS[1], '*', 'stream', ARGV[at], 'event', ARGV[at + 1])
  else
    redis.call('XADD', KEYS[1], '*', 'stream', ARGV[at], 'event', ARGV[at + 1],
      'position', ARGV[at + 2])
  end
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
        self._next = dict.fromkeys(streams, 0)
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
                stream = self._random.choice(list(self._next))
                start = self._next[stream]
                burst = (stream, start, start + self._random.randint(1, LONGEST_BURST))
                if not self._append(burst):
                    continue
                self._next[stream] = burst[2]
                self.appended += burst[2] - start
                earlier = [*earlier[-20:], burst]
                if self._random.random() < RETRIES:
                    self._append_again(burst)
                if self._random.random() < LATE_RETRIES:
                    self._append_again(self._random.choice(earlier))

    def find_positions(self) -> None:
        """Continue each stream with positions behind its last event in its topic: the store may
        have lost some. Called while the lock is held and the store serves."""
        client = self._connect()
        streams = [stream for stream in self._next if has_positions(stream)]
        for partition in set(map(partition_of, streams)):
            of_topic = {stream for stream in streams if partition_of(stream) == partition}
            for stream, last in _find_last(client, topic(partition), of_topic).items():
                lost = self._next[stream] - last - 1
                self.seen["events lost by the store, appended again"] += lost
                self._next[stream] = last + 1
        client.close()

    def _append_again(self, burst: Burst) -> None:
        # a burst that the store has lost since would leave a gap
        if burst[2] <= self._next[burst[0]]:
            self.seen["bursts appended again"] += self._append(burst)

    def _append(self, burst: Burst) -> bool:
        """Append a burst until it is acknowledged, or the producer is stopped; whether it was."""
        stream, start, end = burst
        arguments: list[Any] = []
        rows = self._events.read(stream, start, end - start)
        for position, row in enumerate(rows.tolist(), start):
            arguments += (stream, str(row), position if has_positions(stream) else "")
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
    """The largest position of each stream in a topic; -1 without any."""
    last, before, remaining = dict.fromkeys(streams, -1), "+", PAGES_BEHIND
    while remaining and (entries := client.xrevrange(name, before, "-", PAGE)):
        # retries may be behind the events that they repeat
        remaining -= min(last.values()) >= 0
        for _, fields in entries:
            stream = fields[b"stream"].decode()
            if stream in streams:
                last[stream] = max(last[stream], int(fields[b"position"]))
        before = f"({entries[-1][0].decode()}"
    return last
