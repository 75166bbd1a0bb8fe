"""Policies of a batcher: batching delay and admission control.

Admission control accepts a job into the queue or rejects it (backpressure, load shedding). The
queue is bounded by its length and by waiting time: at the current drain rate, a new job must start
before its deadline and within `max_wait_s`. Otherwise it is rejected at once, with the time that
the queue needs to drain as `Retry-After`. What counts is the number of jobs that start before the
new one: one job of each ready request, and the backlog of its own stream, at the stream's own rate.
The backlog of a stream is limited to a share of the free places (dynamic threshold), and a request
to what it leaves to others. So a backlog affects its own callers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any, Final, NamedTuple

import structlog

from service.core.errors import Overloaded, StreamOverloaded
from service.engine.fair_queue import Backlog, DrainRate, FairQueue

MAX_DELAY_TURNS: Final = 16
"""Longest batching delay while no batch is in flight, in turns of the event loop."""

LINGER_TICKS: Final = 2
"""Longest batching delay (linger) while a batch is in flight, in timer ticks of `LINGER_TICK_S`."""

NO_LINGER_ROWS: Final = 32
"""A batch of this many rows never lingers: its fixed cost is spread well enough, and with the batch
in flight it keeps both the event loop and the store busy."""

MAX_RETRY_AFTER_S: Final = 60.0

STREAM_SHARE: Final = 4
"""A stream's backlog may take 1 / `STREAM_SHARE` of the free places in the queue."""

log = structlog.get_logger(__name__)


class BatchDelay(Enum):
    """How long to delay the next batch."""

    NONE = "start it now"
    LOOP_TURN = "for one turn of the event loop"
    LINGER = "until a batch in flight ends, for `LINGER_TICKS` at most"


def batching_delay(ready: int, last_rows: int, in_flight: int, turns: int) -> BatchDelay:
    """Decide the batching delay: a batch smaller than the last one waits briefly for more jobs.

    Every batch has a fixed cost, which its chunks share. Closed-loop clients send their next
    requests within a few turns of the event loop after the replies, so a batch in flight that is
    about to end brings more jobs. A lone request is never delayed.

    Args:
        ready: number of ready jobs.
        last_rows: rows of the last batch.
        in_flight: number of running batches, without those of long jobs.
        turns: turns of the event loop by which the batch was delayed already.
    """
    if not 0 < ready < last_rows:
        return BatchDelay.NONE
    if in_flight:
        return BatchDelay.LINGER if ready < NO_LINGER_ROWS else BatchDelay.NONE
    return BatchDelay.LOOP_TURN if turns < MAX_DELAY_TURNS else BatchDelay.NONE


class Rejection(NamedTuple):
    """Why a job is not admitted.

    Attributes:
        waiting: number of jobs that start before it.
        per_s: jobs that start per second; None if unknown.
        of_stream: whether these jobs are the backlog of its own stream.
    """

    waiting: int
    per_s: float | None
    of_stream: bool

    def error(self) -> Overloaded:
        """The error for the caller."""
        kind = StreamOverloaded if self.of_stream else Overloaded
        what = "chunks of this stream" if self.of_stream else "chunks"
        if self.per_s is None:
            return kind(f"{self.waiting} {what} are waiting, which is the limit", retry_after_s=1)
        drained_s = min(MAX_RETRY_AFTER_S, max(1.0, round(self.waiting / self.per_s, 1)))
        return kind(
            f"{self.waiting} {what} are waiting, and {self.per_s:.0f} are done per second",
            retry_after_s=drained_s,
        )


shared_error = lru_cache(maxsize=64)(Rejection.error)
"""`Rejection.error` with one shared object for equal rejections."""


class Admission:
    """Admission control of one batcher.

    Args:
        queue: the waiting jobs.
        rate: how fast the queue drains.
        max_queue, max_wait_s, on_shedding: as the batcher's.
    """

    def __init__(
        self,
        queue: FairQueue[Any, Any],
        rate: DrainRate,
        *,
        max_queue: int,
        max_wait_s: float,
        on_shedding: Callable[[bool], None],
    ):
        self._queue = queue
        self._rate = rate
        self._max_queue = max_queue
        self._max_wait_s = max_wait_s
        self._on_shedding = on_shedding
        self._is_shedding = False

    def admits_all(self, keys: Sequence[Hashable | None], left_s: float) -> bool:
        """Whether all jobs of a request are certainly admitted: there is room, and no job of their
        streams waits or runs.

        Args:
            left_s: time until their deadline.
        """
        waiting, rate = len(self._queue) + len(keys) - 1, self._rate.per_s
        has_room = self._max_queue - waiting >= len(keys)
        is_in_time = rate is None or waiting < self._max_before(left_s, rate)
        return has_room and is_in_time and self._queue.are_idle(keys)

    def check_admission(
        self, key: Hashable | None, left_s: float, index: int = 0, ahead: int = 0
    ) -> Rejection | None:
        """Decide whether a job is admitted; returns why not, or None if it is.

        Args:
            left_s: time until the job's deadline.
            index: number of jobs of the same request before it.
            ahead: how many of them were admitted and are not in the queue yet.
        """
        queue, rate = self._queue, self._rate.per_s
        waiting = len(queue) + ahead
        room = self._max_queue - waiting
        if room <= index:
            self._report_shedding(waiting)
            return Rejection(waiting, rate, False)
        if rate is not None and waiting >= (max_before := self._max_before(left_s, rate)):
            # round robin: before a request's n-th job, every other request starts up to n jobs
            requests = queue.requests + (ahead > 0)
            before = min(queue.ready() + ahead, requests * (index + 1))
            if before >= max_before:
                self._report_shedding(before)
                return Rejection(before, rate, False)
        backlog = queue.backlog(key)
        if backlog is None:
            return None
        waiting, rate = len(backlog.jobs), backlog.per_s
        max_backlog = max(1, room // STREAM_SHARE)
        if waiting < max_backlog and (rate is None or waiting < self._max_before(left_s, rate)):
            return None
        self._report_stream_shedding(backlog)
        return Rejection(waiting, rate, True)

    def _max_before(self, left_s: float, per_s: float) -> float:
        """How many jobs can start at a rate before a job that has `left_s` until its deadline."""
        wait_s = min(self._max_wait_s, left_s)
        if wait_s == math.inf:
            return math.inf
        # at least one, since a job in an empty queue does not wait
        return max(1, int(wait_s * per_s))

    def stop_shedding(self) -> None:
        """Report the end of load shedding: the queue is drained, or the batcher stops."""
        if self._is_shedding:
            self._is_shedding = False
            self._on_shedding(False)

    def _report_shedding(self, waiting: int) -> None:
        """Report the start of load shedding, once until the queue is drained."""
        if not self._is_shedding:
            self._is_shedding = True
            self._on_shedding(True)
            rate = self._rate.per_s
            log.warning("overloaded", waiting=waiting, done_per_s=rate and round(rate, 1))

    def _report_stream_shedding(self, backlog: Backlog[Any, Any]) -> None:
        """Log that a stream is overloaded, once until its backlog is empty."""
        if not backlog.is_shedding:
            backlog.is_shedding = True
            rate = backlog.per_s
            log.warning(
                "stream_overloaded",
                stream=getattr(backlog.key, "stream", backlog.key),
                waiting=len(backlog.jobs),
                done_per_s=rate and round(rate, 1),
            )
