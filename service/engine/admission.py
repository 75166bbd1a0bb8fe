"""Admission control: which jobs a batcher takes, and what those are told that it does not.

The queue is bounded in jobs and, while more comes than is done, in time: at the rate at which it
drains, a new job must be begun before its deadline and within `max_wait_s`. Otherwise it is refused
at once, and told how long the queue will take. What counts is what is begun before the new job: one
job of each request that is ready, and the backlog of its own stream, at the rate of that stream. Of
the room that is left in the queue, one stream's backlog gets a share only (a dynamic threshold),
and one request no more than it leaves to others. So a stream's backlog is met by its own callers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, Final, NamedTuple

import structlog

from service.engine.drain_rate import DrainRate
from service.engine.fair_queue import Backlog, FairQueue
from service.errors import Overloaded, StreamOverloaded

MAX_RETRY_AFTER_S: Final = 60.0

STREAM_SHARE: Final = 4
"""A stream's backlog may be this part of the room that is left in the queue."""

log = structlog.get_logger(__name__)


class Refusal(NamedTuple):
    """Why a job is not admitted.

    Attributes:
        waiting: jobs that are begun before it.
        per_s: how many are begun in a second, where that is known.
        of_stream: they are the backlog of its own stream.
    """

    waiting: int
    per_s: float | None
    of_stream: bool

    def error(self) -> Overloaded:
        """What the caller is answered."""
        kind = StreamOverloaded if self.of_stream else Overloaded
        what = "chunks of this stream" if self.of_stream else "chunks"
        if self.per_s is None:
            return kind(f"{self.waiting} {what} are waiting, which is the limit", retry_after_s=1)
        drained_s = min(MAX_RETRY_AFTER_S, max(1.0, round(self.waiting / self.per_s, 1)))
        return kind(
            f"{self.waiting} {what} are waiting, and {self.per_s:.0f} are done in a second",
            retry_after_s=drained_s,
        )


shared_error = lru_cache(maxsize=64)(Refusal.error)
"""The same object for as long as it says the same."""


class Admission:
    """Of one batcher.

    Args:
        queue: of its waiting jobs.
        rate: at which they drain.
        max_queue, max_wait_s, on_refusing: as the batcher's.
    """

    def __init__(
        self,
        queue: FairQueue[Any, Any],
        rate: DrainRate,
        *,
        max_queue: int,
        max_wait_s: float,
        on_refusing: Callable[[bool], None],
    ):
        self._queue = queue
        self._rate = rate
        self._max_queue = max_queue
        self._max_wait_s = max_wait_s
        self._on_refusing = on_refusing
        self._refusing = False

    def refusal(self, key: Hashable | None, left_s: float, index: int = 0) -> Refusal | None:
        """Why a job that can wait so long is not admitted, where it is not.

        Args:
            index: how many jobs its request has before it.
        """
        queue, rate = self._queue, self._rate.per_s
        room = self._max_queue - len(queue)
        if room <= index:
            self._note_refusing(len(queue))
            return Refusal(len(queue), rate, False)
        if rate is not None:
            # Before its first job one of each request that is ready is begun, then two, and so on.
            before = min(queue.ready(), queue.requests * (index + 1))
            if before >= self._room(left_s, rate):
                self._note_refusing(before)
                return Refusal(before, rate, False)
        backlog = queue.backlog(key)
        if backlog is None:
            return None
        waiting, rate = len(backlog.jobs), backlog.per_s
        too_many = max(1, room // STREAM_SHARE)
        if waiting < too_many and (rate is None or waiting < self._room(left_s, rate)):
            return None
        self._note_refusing_stream(backlog)
        return Refusal(waiting, rate, True)

    def _room(self, left_s: float, per_s: float) -> float:
        """How many jobs may be begun at that rate before one that can wait so long."""
        wait_s = min(self._max_wait_s, left_s)
        if wait_s == math.inf:
            return math.inf
        # One may always wait: an empty queue takes no time.
        return max(1, int(wait_s * per_s))

    def cease(self) -> None:
        """Nothing is ready any more, or nothing is taken any more."""
        if self._refusing:
            self._refusing = False
            self._on_refusing(False)

    def _note_refusing(self, waiting: int) -> None:
        """Once until nothing was ready again: every refusal is counted by its code."""
        if not self._refusing:
            self._refusing = True
            self._on_refusing(True)
            rate = self._rate.per_s
            log.warning("overloaded", waiting=waiting, done_per_s=rate and round(rate, 1))

    def _note_refusing_stream(self, backlog: Backlog[Any, Any]) -> None:
        """Once until the stream was idle again."""
        if not backlog.is_refusing:
            backlog.is_refusing = True
            rate = backlog.per_s
            log.warning(
                "stream_overloaded",
                stream=getattr(backlog.key, "stream", backlog.key),
                waiting=len(backlog.jobs),
                done_per_s=rate and round(rate, 1),
            )
