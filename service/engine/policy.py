"""Policies of a batcher: batching delay, splitting and admission control.

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
import time
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import structlog

from service.core.errors import Overloaded, StreamOverloaded
from service.engine.fair_queue import Backlog, DrainRate, FairQueue

LOOP_TURN_S: Final = 0.0
"""A wait until the next turn of the event loop."""

LINGER_TICK_S: Final = 0.001
"""Resolution of the event loop's timers."""

MAX_DELAY_TURNS: Final = 16
"""Longest batching delay while no batch is in flight, in turns of the event loop."""

MAX_LINGER_TICKS: Final = 2
"""Longest batching delay (linger) while a batch is in flight, in ticks. A tick is one wait, not a
time: a batch that blocks the event loop may swallow one."""

NO_LINGER_ROWS: Final = 32
"""A batch of this many rows never lingers: its fixed cost is spread well enough, and with the batch
in flight it keeps both the event loop and the store busy."""

MIN_SPLIT_REQUESTS: Final = 24
"""If so many requests are ready and no batch is in flight, the next batch takes half of the jobs
(double buffering): it commits while the others compute, and its clients send their next requests
meanwhile. If all waited for one batch, the core would be idle during its commit. Fewer requests pay
the fixed cost of a second batch with more than the store's time that it hides."""

MIN_SECOND_ROWS: Final = MIN_SPLIT_REQUESTS // 2
"""While a batch is in flight and the core is busy, a smaller one lingers: it would use no idle
time, and pay its fixed cost with fewer rows."""

BUSY_SHARE: Final = 0.9
"""The core is busy if the thread of the event loop runs for more than this share of the time."""

BUSY_SMOOTHING: Final = 0.1
"""Weight of the newest batch in the moving average of that share."""

MAX_RETRY_AFTER_S: Final = 60.0

STREAM_SHARE: Final = 4
"""A stream's backlog may take 1 / `STREAM_SHARE` of the free places in the queue."""

log = structlog.get_logger(__name__)


class BatchingDelay:
    """The batching delay: a batch smaller than the last one waits briefly for more jobs.

    Every batch has a fixed cost, which its chunks share. Closed-loop clients send their next
    requests within a few turns of the event loop after the replies, so a batch in flight that is
    about to end brings more jobs. Nothing is gained by a small batch beside it unless the core is
    idle while the store writes, because the store is far, say. A lone request is never delayed.

    Args:
        cpu_s: CPU time of the event loop's thread.

    Attributes:
        last_rows: rows of the last batch.
        awaited: the number of ready jobs that end the delay; 0 in its last turn of the loop.
    """

    __slots__ = (
        "_busy_share",
        "_cpu_s",
        "_started_cpu_s",
        "_started_s",
        "_waits",
        "awaited",
        "last_rows",
    )

    def __init__(self, cpu_s: Callable[[], float] = time.thread_time) -> None:
        self.last_rows, self.awaited = 0, 1
        self._waits = 0
        self._cpu_s = cpu_s
        self._started_s = self._started_cpu_s = self._busy_share = 0.0

    def note_start(self, rows: int, now_s: float) -> None:
        """Note that a batch starts, at a time of the monotonic clock."""
        self.last_rows, cpu_s = rows, self._cpu_s()
        share = min(1.0, (cpu_s - self._started_cpu_s) / max(now_s - self._started_s, 1e-9))
        self._busy_share += BUSY_SMOOTHING * (share - self._busy_share)
        self._started_s, self._started_cpu_s = now_s, cpu_s

    def decide(self, ready: int, in_flight: int) -> float | None:
        """Decide whether the next batch is delayed, or further delayed.

        Args:
            ready: number of ready jobs.
            in_flight: number of running batches, without those of long jobs.

        Returns:
            Seconds to wait before this is decided again; None if the batch starts now.
        """
        max_rows = self.last_rows
        if in_flight:
            if max_rows > 1 and self._busy_share > BUSY_SHARE:
                max_rows = max(max_rows, MIN_SECOND_ROWS)
            max_rows = min(max_rows, NO_LINGER_ROWS)
        max_waits = MAX_LINGER_TICKS if in_flight else MAX_DELAY_TURNS
        if 0 < ready < max_rows and self._waits < max_waits:
            self._waits += 1
            self.awaited = max_rows if in_flight else 0
            return LINGER_TICK_S if in_flight else LOOP_TURN_S
        self._waits, self.awaited = 0, 1
        return None

    def note_batch_end(self) -> None:
        """Note that a batch has ended: what it brings decides again about a delayed one."""
        if self.awaited:
            self.awaited = 1


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
"""`Rejection.error` with one object for equal rejections, which must not be raised."""


class Admission:
    """Admission control of one batcher.

    Args:
        queue: the waiting jobs.
        max_queue, max_wait_s, on_shedding: as the batcher's.

    Attributes:
        rate: how fast the queue drains.
    """

    def __init__(
        self,
        queue: FairQueue[Any, Any],
        *,
        max_queue: int,
        max_wait_s: float,
        on_shedding: Callable[[bool], None],
    ):
        self._queue = queue
        self.rate = DrainRate()
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
        waiting, rate = self._queue.waiting + len(keys) - 1, self.rate.per_s
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
        queue, rate = self._queue, self.rate.per_s
        waiting = queue.waiting + ahead
        room = self._max_queue - waiting
        if room <= index:
            self._report_shedding(waiting)
            return Rejection(waiting, rate, False)
        if rate is not None and waiting >= (max_before := self._max_before(left_s, rate)):
            # round robin: before a request's n-th job, every other request starts up to n jobs
            requests = queue.requests + (ahead > 0)
            before = min(queue.ready + ahead, requests * (index + 1))
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

    def note_ready(self, now_s: float, ready: int) -> None:
        """Note the number of ready jobs, after starting those that may; 0 ends load shedding."""
        self.rate.note(now_s, ready)
        if self._is_shedding and not ready:
            self._is_shedding = False
            self._on_shedding(False)

    def _report_shedding(self, waiting: int) -> None:
        """Report the start of load shedding, once until the queue is drained."""
        if not self._is_shedding:
            self._is_shedding = True
            self._on_shedding(True)
            rate = self.rate.per_s
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
