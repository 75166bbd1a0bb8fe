"""Rate limits of access keys: requests, events and concurrent requests in one process.

Limits of streams and their bytes are quotas (`service.pipeline.quota`). Each process counts for
itself, in memory, so that a limit costs no round trip. Rates are token buckets that hold the tokens
of one second and may be overdrawn: a request is accepted while there is a token, and one with many
events delays the next ones. So a chunk of any length is accepted, and the rate holds on average.

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
        streams: the most streams that it may have created.
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
    """Tokens that are added at a rate, up to those of one second, and at least one.

    Attributes:
        level: tokens that there were at the last `has_token`, less those that were taken since;
            more may be taken than there are.
    """

    __slots__ = ("_burst", "_updated_s", "level", "rate_per_s")

    def __init__(self, rate_per_s: float, now_s: float):
        self.rate_per_s = rate_per_s
        self._burst = self.level = max(1.0, rate_per_s)
        self._updated_s = now_s

    def has_token(self, now_s: float) -> bool:
        """Whether there is a token now."""
        level = self.level + (now_s - self._updated_s) * self.rate_per_s
        # `min` takes three times as long
        self.level = level = self._burst if level > self._burst else level
        self._updated_s = now_s
        return level >= 1.0

    def wait_s(self) -> float:
        """Time until there is a token, if there was none."""
        return (1.0 - self.level) / self.rate_per_s


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
        self._most_concurrent: int | None = None
        self._requests: TokenBucket | None = None
        self._events: TokenBucket | None = None
        self.update(limits)

    def update(self, limits: KeyLimits) -> None:
        """Apply changed limits; buckets whose rate is the same keep their tokens."""
        self.limits = limits
        self._most_concurrent = limits.concurrent_requests
        self._requests = self._bucket(self._requests, limits.requests_per_s)
        self._events = self._bucket(self._events, limits.events_per_s)

    def _bucket(self, before: TokenBucket | None, rate_per_s: float | None) -> TokenBucket | None:
        if rate_per_s is None:
            return None
        if before is not None and before.rate_per_s == rate_per_s:
            return before
        return TokenBucket(rate_per_s, self._clock())

    def rejection(self) -> LimitExceeded | None:
        """The error with which a request would be rejected now; None if it would be accepted."""
        most = self._most_concurrent
        if most is not None and self._concurrent >= most:
            return self._error("concurrent_requests", most, RETRY_AFTER_S)
        requests, events = self._requests, self._events
        now_s = self._clock()
        if requests is not None and not requests.has_token(now_s):
            return self._error("requests_per_s", requests.rate_per_s, requests.wait_s())
        if events is not None and not events.has_token(now_s):
            return self._error("events_per_s", events.rate_per_s, events.wait_s())
        return None

    def begin(self, events: int) -> None:
        """Count a request that was accepted; `end` ends it."""
        self._concurrent += 1
        if self._requests is not None:
            self._requests.level -= 1
        if self._events is not None:
            self._events.level -= events

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
            retry_after_s=round(min(retry_after_s, MAX_RETRY_AFTER_S), 3),
        ).of_key(limit, self._key_id)


class KeyLimiters:
    """The limiters of all keys that have limits, in this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._limiters: dict[str, KeyLimiter] = {}

    def limiter(self, key_id: str, limits: KeyLimits | None) -> KeyLimiter | None:
        """The limiter of a key, with its present limits; None if it has none.

        It outlives the scoped pipelines of the key, so that a change of the key resets no count.
        """
        if limits is None or not any(getattr(limits, name) for name in IN_MEMORY):
            return None
        limiter = self._limiters.get(key_id)
        if limiter is None:
            limiter = self._limiters[key_id] = KeyLimiter(key_id, limits, self._clock)
        elif limiter.limits != limits:
            limiter.update(limits)
        return limiter
