"""Retry: exponential backoff with jitter until a time limit, for one request."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Final, TypeVar

from carry_client.errors import Problem

FIRST_BACKOFF_S: Final = 0.05
LONGEST_BACKOFF_S: Final = 2.0

T = TypeVar("T")


class Retry:
    """Repeats attempts that fail with a retryable problem.

    Attributes:
        failures: attempts that failed.
    """

    def __init__(
        self,
        limit_s: float,
        random: Random | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Nothing has failed yet.

        Args:
            limit_s: longest time from the first failure to the last attempt.
            random: draws the jitter, which keeps many clients from returning at once.
        """
        self.limit_s = limit_s
        self.failures = 0
        self._random = random or Random()  # noqa: S311
        self._clock = clock
        self._sleep = sleep
        self._first_failure_s = 0.0

    def next_delay_s(self, problem: Problem) -> float:
        """How long to wait before the next attempt.

        Raises:
            Problem: the one that was passed; it is not retryable, or the limit is over.
        """
        now_s = self._clock()
        if self.failures == 0:
            self._first_failure_s = now_s
        self.failures += 1
        remaining_s = self._first_failure_s + self.limit_s - now_s
        if not problem.is_retryable or remaining_s <= 0:
            try:
                raise problem
            finally:
                # it would refer to itself by its traceback, and keep the callers' frames
                del problem
        backoff_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (self.failures - 1))
        backoff_s *= self._random.uniform(0.5, 1.0)
        return min(max(backoff_s, problem.retry_after_s), remaining_s)

    def run(self, attempt: Callable[[], T]) -> T:
        """The result of the first attempt that succeeds.

        Raises:
            Problem: of the last attempt.
        """
        while True:
            try:
                return attempt()
            except Problem as problem:
                self._sleep(self.next_delay_s(problem))
