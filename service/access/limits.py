"""Rate limits of access keys: requests and events of all processes, concurrent requests of one.

Limits of streams and their bytes are quotas (`service.access.quota`). Rates are token buckets in
the store (`RateLeases`) that hold the tokens of one second and may be overdrawn: a request is
accepted while there is a token, and one with many events delays the next ones. So a chunk of any
length is accepted, and the rate holds on average.

A request pays no round trip: it spends tokens that the process has leased, and one background task
reports the spent tokens and renews the leases. Between two renewals a process also spends its share
of the tokens that the bucket must have by now: these, divided by the number of processes that use
it. So a key that one process serves has the whole rate and burst there. While the store does not
answer, each process accepts its share, and the tokens that it spends then are not counted.

Use from one event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Final

import msgspec
import structlog

from service.core.errors import CarryError, LimitExceeded
from service.store.capabilities import Lease, LeaseRequest, RateLeases

RETRY_AFTER_S: Final = 1.0
"""When to send a request again that exceeds the number of concurrent ones."""

MAX_RETRY_AFTER_S: Final = 60.0

TICK_S: Final = 0.05
"""Shortest interval between two renewals of a lease."""

RENEW_S: Final = 0.5
"""A lease of which little was spent is renewed after this, and ends if nothing was spent."""

RENEW_TIMEOUT_S: Final = 0.5
"""Longest wait for the store when leases are renewed."""

UNKNOWN_PART: Final = 0.1
"""Share of the burst that a process spends before its first lease: it may be one of many."""

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
"""The limits that processes enforce without a round trip."""

log = structlog.get_logger(__name__)


class RateShare:
    """What one process may spend of a token bucket.

    Attributes:
        level: tokens that it may spend now; more may be spent than there are.
        is_short: a request was rejected since the last lease.
    """

    def __init__(self, name: str, rate_per_s: float, now_s: float):
        self.name = name
        self.rate_per_s = rate_per_s
        self._burst = max(1.0, rate_per_s)
        self.level = self._start = 0.0
        self.is_short = False
        # tokens that no process has leased, when that was known, and among how many they are shared
        self._free, self._free_s = max(1.0, UNKNOWN_PART * self._burst), now_s
        self._processes = 1
        self._leased_s = -math.inf

    def borrow(self, now_s: float, *, is_active: bool) -> bool:
        """Add this process's share of the tokens that the bucket must have by now; False if it has
        no token to spend even then.

        It is at least one token if the process did not use the bucket lately."""
        free = self._estimate(now_s)
        part = free / self._processes
        if not is_active and free >= 1.0:
            part = max(part, 1.0)
        if self.level + part < 1.0:
            self.is_short = True
            return False
        self.level += part
        self._start += part
        self._free, self._free_s = 0.0, now_s
        return True

    def wait_s(self, now_s: float) -> float:
        """Time until there is a token, if there is none and all processes spend as much."""
        part = self._estimate(now_s) / self._processes
        return (1.0 - self.level - part) * self._processes / self.rate_per_s

    def _estimate(self, now_s: float) -> float:
        free = self._free + (now_s - self._free_s) * self.rate_per_s
        return min(self._burst - self.level, free)

    @property
    def spent(self) -> float:
        """Tokens that were spent since the last lease began."""
        return self._start - self.level

    @property
    def is_idle(self) -> bool:
        """Whether nothing was spent since the last lease began, nor rejected."""
        return self.level == self._start and not self.is_short

    def is_due(self, now_s: float) -> bool:
        """Whether the lease is to be renewed, or ends."""
        age_s = now_s - self._leased_s
        has_new_token = self.is_short and age_s * self.rate_per_s >= 1.0
        return has_new_token or 2 * self.level < self._start or age_s >= RENEW_S

    def expire(self) -> None:
        """Make the renewal due at once."""
        self._leased_s = -math.inf

    def request(self, now_s: float) -> LeaseRequest:
        """The request for the next lease."""
        self._leased_s, self.is_short = now_s, False
        return LeaseRequest(self.name, self.rate_per_s, self._burst, self.spent)

    def end(self) -> None:
        """Spend nothing more of the lease, which is not renewed."""
        self.level = self._start = min(0.0, self.level)

    def forget(self) -> None:
        """Forget what was spent: the store does not answer, or may have counted it."""
        self._start = self.level

    def update(self, request: LeaseRequest, lease: Lease, now_s: float) -> None:
        """Begin the lease that was requested."""
        spent_since = self.spent - request.spent
        self._start, self.level = lease.tokens, lease.tokens - spent_since
        self._free, self._free_s, self._processes = lease.free, now_s, lease.processes


class KeyLimiter:
    """Enforces the limits of one key in this process.

    Args:
        on_active: called when requests arrive after none did, so that leases are to be renewed.

    Attributes:
        limits: in force; set them by `KeyLimiters.limiter`.
        is_active: whether leases are renewed.
    """

    def __init__(
        self,
        key_id: str,
        limits: KeyLimits,
        clock: Callable[[], float],
        on_active: Callable[[KeyLimiter], None],
    ):
        self._key_id = key_id
        self._clock = clock
        self._on_active = on_active
        self._concurrent = 0
        self.is_active = False
        self.limits = KeyLimits()
        self._max_concurrent: int | None = None
        self._requests: RateShare | None = None
        self._events: RateShare | None = None
        self.update(limits)

    def update(self, limits: KeyLimits) -> None:
        """Apply changed limits; shares of rates that are the same keep their tokens."""
        self.limits = limits
        if not self.shares:
            self.is_active = False
        self._max_concurrent = limits.concurrent_requests
        self._requests = self._share(self._requests, "requests_per_s", limits.requests_per_s)
        self._events = self._share(self._events, "events_per_s", limits.events_per_s)

    def _share(
        self, before: RateShare | None, limit: str, rate_per_s: float | None
    ) -> RateShare | None:
        if rate_per_s is None:
            return None
        if before is not None and before.rate_per_s == rate_per_s:
            return before
        return RateShare(f"{self._key_id}:{limit}", rate_per_s, self._clock())

    @property
    def shares(self) -> list[RateShare]:
        """Its shares of the buckets of its limits."""
        return [share for share in (self._requests, self._events) if share is not None]

    def rejection(self) -> LimitExceeded | None:
        """The error with which a request would be rejected now; None if it would be accepted."""
        maximum = self._max_concurrent
        if maximum is not None and self._concurrent >= maximum:
            return self._error("concurrent_requests", maximum, RETRY_AFTER_S)
        requests, events = self._requests, self._events
        if requests is not None and requests.level < 1.0:
            now_s = self._clock()
            if not requests.borrow(now_s, is_active=self.is_active):
                return self._error("requests_per_s", requests.rate_per_s, requests.wait_s(now_s))
        if events is not None and events.level < 1.0:
            now_s = self._clock()
            if not events.borrow(now_s, is_active=self.is_active):
                return self._error("events_per_s", events.rate_per_s, events.wait_s(now_s))
        return None

    def begin(self, events: int) -> None:
        """Count a request that was accepted; `end` ends it."""
        self._concurrent += 1
        if self._requests is not None:
            self._requests.level -= 1
        if self._events is not None:
            self._events.level -= events
        if not self.is_active:
            self._activate()

    def _activate(self) -> None:
        for share in self.shares:
            share.expire()
        self.is_active = True
        if self.shares:
            self._on_active(self)

    def end(self, _: object = None) -> None:
        """The request was answered or cancelled."""
        self._concurrent -= 1

    def start(self, events: int) -> None:
        """Count a request, if it is accepted; `end` ends it.

        Raises:
            LimitExceeded
        """
        rejection = self.rejection()
        if rejection is not None:
            raise rejection
        self.begin(events)

    @contextmanager
    def request(self, events: int) -> Iterator[None]:
        """Count a request while it is being answered.

        Raises:
            LimitExceeded
        """
        self.start(events)
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
        ).with_key(limit, self._key_id)


class KeyLimiters:
    """The limiters of all keys that have limits, in this process.

    Args:
        leases: leases tokens of the store's buckets.
    """

    def __init__(self, leases: RateLeases, clock: Callable[[], float] = time.monotonic):
        self._leases = leases
        self._clock = clock
        self._limiters: dict[str, KeyLimiter] = {}
        self._active: set[KeyLimiter] = set()
        self._wake = asyncio.Event()
        self._is_failing = False

    def limiter(self, key_id: str, limits: KeyLimits | None) -> KeyLimiter | None:
        """The limiter of a key, with its present limits; None if it has none.

        It outlives the callers with the key, so that a change of the key resets no count.
        """
        if limits is None or not any(getattr(limits, name) for name in IN_MEMORY):
            return None
        limiter = self._limiters.get(key_id)
        if limiter is None:
            limiter = KeyLimiter(key_id, limits, self._clock, self._note_active)
            self._limiters[key_id] = limiter
        elif limiter.limits != limits:
            limiter.update(limits)
        return limiter

    def _note_active(self, limiter: KeyLimiter) -> None:
        self._active.add(limiter)
        self._wake.set()

    async def run(self) -> None:
        """Keep the leases renewed; until it is cancelled, before the store is closed."""
        while True:
            self._wake.clear()
            await self.renew()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), TICK_S if self._active else None)

    async def renew(self) -> None:
        """Renew the leases that are due; those of keys without requests end."""
        now_s = self._clock()
        due: list[RateShare] = []
        for limiter in list(self._active):
            shares = limiter.shares
            if not any(share.is_due(now_s) for share in shares) and shares:
                continue
            if all(share.is_idle for share in shares):
                limiter.is_active = False
                self._active.discard(limiter)
                for share in shares:
                    share.end()
            else:
                due += shares
        if not due:
            return
        requests = [share.request(now_s) for share in due]
        leases = await self._leases.lease(requests, time.monotonic() + RENEW_TIMEOUT_S)
        errors: list[CarryError] = []
        for share, request, lease in zip(due, requests, leases, strict=True):
            if isinstance(lease, CarryError):
                share.forget()
                errors.append(lease)
            else:
                share.update(request, lease, self._clock())
        if errors and not self._is_failing:
            reason = errors[0].detail
            log.warning("rate_leases_not_renewed", code=errors[0].code, reason=reason)
        self._is_failing = bool(errors)
