"""Limits of access keys: rates of requests and events, concurrent requests, quotas of streams.

Rates hold over all processes. They are token buckets in the store (`RateLeases`) that hold the
tokens of one second and may be overdrawn: a request is accepted while there is a token, and one
with many events delays the next ones. So a chunk of any length is accepted, and the rate holds on
average. A request pays no round trip: it spends tokens that the process has leased, and one
background task reports the spent tokens and renews the leases. Between two renewals a process also
spends its share of the tokens that the bucket must have by now: these, divided by the number of
processes that use it. So a key that one process serves has the whole rate and burst there. While
the store does not answer, each process accepts its share, and the tokens that it spends then are
not counted.

A quota is the most streams that a key may have created, and the most bytes of their states. The
store counts (`StreamUsage`), so it holds over all processes too. A chunk, a restore or a fork that
would create a stream registers it first; a deletion with the key releases the streams that it
deleted. Streams that another key deleted, that expired, or that a crash left registered are removed
when the quota is reached, at most every `RECONCILE_S` in a process.

Use from one event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Annotated, Any, Final

import msgspec
import structlog

from service.core.errors import CarryError, LimitExceeded
from service.core.values import StreamKey
from service.store.capabilities import Lease, LeaseRequest, Quota, RateLeases, StreamUsage

RETRY_AFTER_S: Final = 1.0
"""When to send a request again that exceeds the number of concurrent ones."""

QUOTA_RETRY_AFTER_S: Final = 10.0
MAX_RETRY_AFTER_S: Final = 60.0
RECONCILE_S: Final = 5.0

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


_RATES: Final = ("requests_per_s", "events_per_s")

log = structlog.get_logger(__name__)


class RateShare:
    """What one process may spend of a token bucket.

    Attributes:
        limit: its name.
        level: tokens that it may spend now; more may be spent than there are.
    """

    def __init__(self, key_id: str, limit: str, rate_per_s: float, now_s: float):
        self.limit = limit
        self.rate_per_s = rate_per_s
        self._bucket = f"{key_id}:{limit}"
        self._burst = max(1.0, rate_per_s)
        # when the lease began
        self.level = self._start = 0.0
        self._leased_s = -math.inf
        # whether a request was rejected since then
        self._is_short = False
        # tokens that no process has leased, when that was known, and among how many they are shared
        self._free, self._free_s = max(1.0, UNKNOWN_PART * self._burst), now_s
        self._processes = 1

    def borrow(self, now_s: float, *, is_active: bool) -> bool:
        """Add this process's share of the tokens that the bucket must have by now; False if it has
        no token to spend even then.

        It is at least one token if the process did not use the bucket lately."""
        free = self._estimate(now_s)
        part = free / self._processes
        if not is_active and free >= 1.0:
            part = max(part, 1.0)
        if self.level + part < 1.0:
            self._is_short = True
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
    def is_idle(self) -> bool:
        """Whether nothing was spent since the last lease began, nor rejected."""
        return self.level == self._start and not self._is_short

    def is_due(self, now_s: float) -> bool:
        """Whether the lease is to be renewed, or ends."""
        age_s = now_s - self._leased_s
        has_new_token = self._is_short and age_s * self.rate_per_s >= 1.0
        return has_new_token or 2 * self.level < self._start or age_s >= RENEW_S

    def expire(self) -> None:
        """Make the renewal due at once."""
        self._leased_s = -math.inf

    def end(self) -> None:
        """Spend nothing more of the lease, which is not renewed."""
        self.level = self._start = min(0.0, self.level)

    def request(self, now_s: float) -> LeaseRequest:
        """The request for the next lease."""
        self._leased_s, self._is_short = now_s, False
        return LeaseRequest(self._bucket, self.rate_per_s, self._burst, self._start - self.level)

    def forget(self) -> None:
        """Forget what was spent: the store does not answer, or may have counted it."""
        self._start = self.level

    def update(self, request: LeaseRequest, lease: Lease, now_s: float) -> None:
        """Begin the lease that was requested."""
        spent_since = self._start - self.level - request.spent
        self._start, self.level = lease.tokens, lease.tokens - spent_since
        self._free, self._free_s, self._processes = lease.free, now_s, lease.processes


class KeyLimiter:
    """Enforces the rates and the concurrent requests of one key in this process.

    Args:
        on_active: called when requests arrive after none did, so that leases are to be renewed.

    Attributes:
        limits: in force; set them by `KeyLimiters.limiter`.
        shares: of the buckets of its rates.
        is_active: whether leases are renewed.
    """

    def __init__(
        self, key_id: str, clock: Callable[[], float], on_active: Callable[[KeyLimiter], None]
    ):
        self._key_id = key_id
        self._clock = clock
        self._on_active = on_active
        self._concurrent = 0
        self.is_active = False
        self.limits = KeyLimits()
        self.shares: list[RateShare] = []

    def update(self, limits: KeyLimits) -> None:
        """Apply changed limits; shares of rates that are the same keep their tokens."""
        self.limits = limits
        known = {(share.limit, share.rate_per_s): share for share in self.shares}
        rates = [(limit, rate) for limit in _RATES if (rate := getattr(limits, limit)) is not None]
        self.shares = [
            known.get(rate) or RateShare(self._key_id, *rate, self._clock()) for rate in rates
        ]

    def rejection(self) -> LimitExceeded | None:
        """The error with which a request would be rejected now; None if it would be accepted."""
        maximum = self.limits.concurrent_requests
        if maximum is not None and self._concurrent >= maximum:
            return _limit_exceeded(self._key_id, "concurrent_requests", maximum, RETRY_AFTER_S)
        for share in self.shares:
            if share.level < 1.0:
                now_s = self._clock()
                if not share.borrow(now_s, is_active=self.is_active):
                    wait_s = share.wait_s(now_s)
                    return _limit_exceeded(self._key_id, share.limit, share.rate_per_s, wait_s)
        return None

    def begin(self, events: int) -> None:
        """Count a request that was accepted; `end` ends it."""
        self._concurrent += 1
        for share in self.shares:
            share.level -= events if share.limit == "events_per_s" else 1
        if self.shares and not self.is_active:
            self.is_active = True
            for share in self.shares:
                share.expire()
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


class KeyLimiters:
    """The limiters of all keys that have rates or a number of concurrent requests.

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
        if limits is None or not any(
            getattr(limits, name) for name in (*_RATES, "concurrent_requests")
        ):
            return None
        limiter = self._limiters.get(key_id)
        if limiter is None:
            limiter = KeyLimiter(key_id, self._clock, self._note_active)
            self._limiters[key_id] = limiter
        if limiter.limits != limits:
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
                errors.append(lease)
                share.forget()
            else:
                share.update(request, lease, self._clock())
        if errors and not self._is_failing:
            reason = errors[0].detail
            log.warning("rate_leases_not_renewed", code=errors[0].code, reason=reason)
        self._is_failing = bool(errors)


class StreamQuota:
    """The quota of one key in one process.

    Attributes:
        key_id: of the key.
        quota: the most that it may use.
    """

    def __init__(self, usage: StreamUsage, key_id: str, quota: Quota):
        self._usage = usage
        self.key_id = key_id
        self.quota = quota
        self._reconciled_s = -math.inf

    async def register(
        self, keys: Sequence[StreamKey], size_bytes: int, deadline_s: float = math.inf
    ) -> list[LimitExceeded | None]:
        """Register streams that are about to be created; the error of each that exceeds the quota.

        Call it between the read of the heads that the commits expect and the commits.

        Args:
            size_bytes: of the state of each.

        Raises:
            StoreUnavailable, StoreRefused
        """
        sizes = [(key, size_bytes) for key in keys]
        result = await self._usage.register(self.key_id, sizes, self.quota, deadline_s)
        return [
            None if accepted else self._error(key, size_bytes, result.streams, result.state_bytes)
            for key, accepted in zip(keys, result.accepted, strict=True)
        ]

    @property
    def may_reconcile(self) -> bool:
        """Whether `reconcile` was not called for a while."""
        return time.monotonic() - self._reconciled_s >= RECONCILE_S

    async def reconcile(self) -> None:
        """Remove the streams that do not exist from the count.

        Raises:
            StoreUnavailable, StoreRefused
        """
        # calls that find the quota reached meanwhile neither wait for this one nor start another
        self._reconciled_s = math.inf
        try:
            await self._usage.reconcile(self.key_id)
        finally:
            self._reconciled_s = time.monotonic()

    async def admit(self, key: StreamKey, size_bytes: int) -> None:
        """Register one stream that is about to be created.

        Raises:
            LimitExceeded, StoreUnavailable, StoreRefused
        """
        (error,) = await self.register([key], size_bytes)
        if error is not None and self.may_reconcile:
            await self.reconcile()
            (error,) = await self.register([key], size_bytes)
        if error is not None:
            raise error

    @asynccontextmanager
    async def releasing(self, keys: Sequence[StreamKey]) -> AsyncIterator[list[StreamKey]]:
        """Release streams that are deleted within the context: those that are added to the list,
        once a tombstone of each is written.

        Raises:
            StoreUnavailable, StoreRefused
        """
        before = await self._usage.find_registrations(self.key_id, keys)
        deleted: list[StreamKey] = []
        try:
            yield deleted
        finally:
            # streams that are not released now are removed when the quota is reached
            with suppress(CarryError):
                registrations = dict(zip(keys, before, strict=True))
                await self._usage.release(
                    self.key_id, [(key, registrations[key]) for key in deleted]
                )

    def _error(self, key: StreamKey, size: int, streams: int, state_bytes: int) -> LimitExceeded:
        limit, allowed, used, needed = "streams", self.quota.streams, streams, ""
        if allowed is None or streams < allowed:
            limit, allowed, used = "state_bytes", self.quota.state_bytes, state_bytes
            needed = f", and the stream needs {size}"
        return _limit_exceeded(
            self.key_id,
            limit,
            allowed or 0,
            QUOTA_RETRY_AFTER_S,
            f"; it uses {used}{needed}",
            used=used,
            stream=key.stream,
        )


def _limit_exceeded(
    key_id: str, limit: str, allowed: float, retry_after_s: float, usage: str = "", **facts: Any
) -> LimitExceeded:
    shown = allowed if isinstance(allowed, int) else f"{allowed:g}"
    return LimitExceeded(
        f"the key {key_id} has reached its limit {limit}: {shown}{usage}",
        key=key_id,
        limit=limit,
        allowed=allowed,
        **facts,
        retry_after_s=round(min(retry_after_s, MAX_RETRY_AFTER_S), 3),
    ).with_key(limit, key_id)
