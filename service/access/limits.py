"""Limits of one access key: how many requests, events and concurrent requests a process accepts.
Those of streams and their bytes are quotas (`service.pipeline.quota`).

Each process counts for itself, in memory, so that a limit costs no round trip. Rates are token
buckets that hold the tokens of one second and may be overdrawn: a request is accepted while there
is a token, and one with many events delays the next ones. So a chunk of any length is accepted, and
the rate holds on average.

Use from one event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Final

import msgspec

from service.core.errors import LimitExceeded

RETRY_AFTER_S: Final = 1.0
"""When to send a request again that exceeds the number of concurrent ones."""

MAX_RETRY_AFTER_S: Final = 60.0

Rate = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(gt=0)]


class KeyLimits(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True
):
    """The limits of a key; None for no limit.

    Attributes:
        streams: the most streams that it may feed.
        state_bytes: the most bytes of their states in the store.
    """

    requests_per_s: Rate | None = None
    events_per_s: Rate | None = None
    concurrent_requests: Count | None = None
    streams: Count | None = None
    state_bytes: Count | None = None


IN_MEMORY: Final = ("requests_per_s", "events_per_s", "concurrent_requests")
"""The limits that each process enforces by itself."""


class TokenBucket:
    """Tokens that are added at a rate, up to those of one second, and at least one."""

    def __init__(self, rate_per_s: float, now_s: float):
        self.rate_per_s = rate_per_s
        self._burst = max(1.0, rate_per_s)
        self._level = self._burst
        self._updated_s = now_s

    def wait_s(self, now_s: float) -> float:
        """Time until there is a token."""
        self._level = min(self._burst, self._level + (now_s - self._updated_s) * self.rate_per_s)
        self._updated_s = now_s
        return max(0.0, (1.0 - self._level) / self.rate_per_s)

    def take(self, tokens: int) -> None:
        """Take tokens, more than there are if need be."""
        self._level -= tokens


class KeyLimiter:
    """Enforces the limits of one key in this process.

    Attributes:
        limits: in force; set them by `KeyLimiters.limiter`.
    """

    def __init__(self, key_id: str, limits: KeyLimits, clock: Callable[[], float]):
        self._key_id = key_id
        self._clock = clock
        self._concurrent = 0
        self.limits = KeyLimits()
        self._buckets: dict[str, TokenBucket] = {}
        self.update(limits)

    def update(self, limits: KeyLimits) -> None:
        """Use other limits from now on; what has not changed keeps its tokens."""
        self.limits = limits
        kept, self._buckets = self._buckets, {}
        for name in ("requests_per_s", "events_per_s"):
            rate_per_s = getattr(limits, name)
            if rate_per_s is None:
                continue
            bucket = kept.get(name)
            if bucket is None or bucket.rate_per_s != rate_per_s:
                bucket = TokenBucket(rate_per_s, self._clock())
            self._buckets[name] = bucket

    def rejection(self) -> LimitExceeded | None:
        """The error with which a request would be rejected now; None if it would be accepted."""
        most = self.limits.concurrent_requests
        if most is not None and self._concurrent >= most:
            return self._error("concurrent_requests", most, RETRY_AFTER_S)
        if not self._buckets:
            return None
        now_s = self._clock()
        for name, bucket in self._buckets.items():
            wait_s = bucket.wait_s(now_s)
            if wait_s > 0:
                return self._error(name, bucket.rate_per_s, min(wait_s, MAX_RETRY_AFTER_S))
        return None

    def begin(self, events: int) -> None:
        """Count a request that was accepted; `end` ends it."""
        self._concurrent += 1
        for name, bucket in self._buckets.items():
            bucket.take(1 if name == "requests_per_s" else events)

    def end(self, _: object = None) -> None:
        """The request was answered or cancelled."""
        self._concurrent -= 1

    @contextmanager
    def request(self, events: int) -> Iterator[None]:
        """Count a request while it is being answered.

        Raises:
            LimitExceeded
        """
        rejection = self.rejection()
        if rejection is not None:
            raise rejection
        self.begin(events)
        try:
            yield
        finally:
            self.end()

    def _error(self, limit: str, allowed: float, retry_after_s: float) -> LimitExceeded:
        return LimitExceeded(
            f"the key {self._key_id} has reached its limit {limit}: {allowed:g}",
            key=self._key_id,
            limit=limit,
            allowed=allowed,
            retry_after_s=round(retry_after_s, 3),
        )


class KeyLimiters:
    """The limiters of all keys that have limits, in this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._limiters: dict[str, KeyLimiter] = {}

    def limiter(self, key_id: str, limits: KeyLimits | None) -> KeyLimiter | None:
        """The limiter of a key, with its present limits; None if it has none.

        It outlives the entries of the key, so that a change of the key resets no count.
        """
        if limits is None or not any(getattr(limits, name) for name in IN_MEMORY):
            return None
        limiter = self._limiters.get(key_id)
        if limiter is None:
            limiter = self._limiters[key_id] = KeyLimiter(key_id, limits, self._clock)
        elif limiter.limits != limits:
            limiter.update(limits)
        return limiter
