"""Limits of a key: rates that several processes keep together, and concurrent requests.

pytest tests/service/access/test_limits.py -k accept_the_rate -s
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from random import Random

import pytest
from structlog.testing import capture_logs

from service.access.limits import KeyLimiter, KeyLimiters, KeyLimits
from service.core.errors import CarryError, LimitExceeded, StoreUnavailable
from service.store.capabilities import Lease, LeaseRequest, RateLeases
from service.store.redis.commands import Script
from tests.support.servers import RealServer, opened

KEY = "0" * 12
TICK_S = 0.05
CLOCK = "test:clock"


class Leases:
    """The leases of a store that may be unavailable."""

    def __init__(self, leases: RateLeases):
        self._leases = leases
        self.is_away = False
        self.calls = 0
        self.on_leased: Callable[[], object] = lambda: None

    async def lease(
        self, requests: Sequence[LeaseRequest], deadline_s: float = math.inf
    ) -> list[Lease | CarryError]:
        self.calls += 1
        if self.is_away:
            return [StoreUnavailable("away")] * len(requests)
        leases = await self._leases.lease(requests, deadline_s)
        self.on_leased()
        return leases


class Processes:
    """Processes on one store, for all of which time passes when the test says so.

    Attributes:
        elapsed_s: the time that has passed.
    """

    def __init__(self, server: RealServer, leases: Sequence[Leases]):
        self._server = server
        self.elapsed_s = 0.0
        self.leases = leases
        self.all = [KeyLimiters(each, self.now_s) for each in leases]
        self.set_store_clock(0)

    def now_s(self) -> float:
        """The clock of the processes."""
        return 100.0 + self.elapsed_s

    def limiter(self, process: int = 0, **limits: float) -> KeyLimiter:
        limiter = self.all[process].limiter(KEY, KeyLimits(**limits))
        assert limiter is not None
        return limiter

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.elapsed_s += seconds
        self.set_store_clock(self.elapsed_s)

    def set_store_clock(self, seconds: float) -> None:
        """Set the store's clock, also back as a failover to another server may do."""
        microseconds = 10**12 + round(1e6 * seconds)
        with self._server.client() as client:
            client.hset(CLOCK, "s", microseconds // 10**6)
            client.hset(CLOCK, "us", microseconds % 10**6)

    async def renew(self) -> None:
        """One turn of the background task of each process."""
        await asyncio.gather(*(each.renew() for each in self.all))


Start = Callable[[int], Processes]


@pytest.fixture
async def start(
    pipeline_server: RealServer, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Start]:
    """Starts processes; their store has the test's clock: its own goes on while a busy machine
    suspends the test."""
    text = Script.load("lease").text
    for own, tests in (
        (b"redis.call('TIME')", b"redis.call('HMGET', '%b', 's', 'us')" % CLOCK.encode()),
        (b"redis.call('PEXPIRE', KEYS[1],", b"return_nothing("),
    ):
        assert text.count(own) == 1
        text = text.replace(own, tests)
    text = b"local function return_nothing() end\n" + text
    script = Script(text, hashlib.sha1(text).hexdigest())
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(opened(store_url)) for _ in range(10)]
        for store in stores:
            monkeypatch.setattr(store.rates, "_script", script)
        yield lambda count: Processes(
            pipeline_server, [Leases(store.rates) for store in stores[:count]]
        )


def accepted(limiter: KeyLimiter, events: int = 1) -> bool:
    """Whether a request is accepted, which then ends at once."""
    try:
        with limiter.request(events):
            return True
    except LimitExceeded:
        return False


async def send(
    processes: Processes, rate_per_s: float, demand: float, weights: Sequence[float], seconds: float
) -> tuple[int, int, float]:
    """Send requests at `demand` times the rate; returns how many were sent and accepted, and the
    time that they took."""
    random = Random(5)
    limiters = [processes.limiter(at, requests_per_s=rate_per_s) for at in range(len(weights))]
    sent = count = 0
    began_s = processes.elapsed_s
    while processes.elapsed_s - began_s < seconds:
        processes.advance(TICK_S)
        due = demand * rate_per_s * (processes.elapsed_s - began_s)
        for limiter in random.choices(limiters, weights, k=int(due) - sent):
            sent += 1
            count += accepted(limiter)
        await processes.renew()
    return sent, count, processes.elapsed_s - began_s


SHAPES = {
    "one": [1.0],
    "2, even": [1.0] * 2,
    "2, skewed": [0.9, 0.1],
    "10, even": [1.0] * 10,
    "10, skewed": [0.9, *[0.1 / 9] * 9],
}
"""The shares of the traffic that processes get."""


@pytest.mark.parametrize("rate_per_s", [2.0, 20.0, 100.0, 1000.0])
@pytest.mark.parametrize("shape", [*SHAPES][1:])
async def test_processes_accept_the_rate_together(
    start: Start, shape: str, rate_per_s: float
) -> None:
    weights = SHAPES[shape]
    processes = start(len(weights))
    # the burst, and what processes spend that do not know of each other yet
    await send(processes, rate_per_s, 3, weights, 3)
    _, received, seconds = await send(processes, rate_per_s, 3, weights, 8)
    part = received / (rate_per_s * seconds)
    print(f"{shape}, {rate_per_s:g} per second: {part:.3f} of the rate")
    # at a low rate, one request more or less counts
    assert abs(part - 1) <= 0.1 + 2 / (rate_per_s * seconds)


@pytest.mark.parametrize("shape", SHAPES)
async def test_requests_below_the_rate_are_accepted_on_any_process(
    start: Start, shape: str
) -> None:
    weights = SHAPES[shape]
    sent, received, _ = await send(start(len(weights)), 40.0, 0.8, weights, 5)
    assert received >= 0.9 * sent


async def test_burst_is_limited_to_one_second_of_the_rate(start: Start) -> None:
    processes = start(1)
    limiter = processes.limiter(requests_per_s=5)
    # before its first lease, a process may be one of many
    assert [accepted(limiter) for _ in range(2)] == [True, False]
    await processes.renew()
    processes.advance(3600)
    await processes.renew()
    assert [accepted(limiter) for _ in range(7)] == [True] * 5 + [False] * 2


async def test_processes_share_one_burst(start: Start) -> None:
    processes = start(10)
    limiters = [processes.limiter(at, requests_per_s=100) for at in range(10)]
    for _ in range(2):
        # with the second renewal they know of each other
        for limiter in limiters:
            accepted(limiter)
        await processes.renew()
        processes.advance(0.6)
    processes.advance(2)
    for _ in range(3):
        await processes.renew()
    assert sum(accepted(limiter) for limiter in limiters for _ in range(100)) <= 100


async def test_rejected_requests_renew_a_lease_once_there_may_be_a_token(start: Start) -> None:
    processes = start(1)
    limiter = processes.limiter(requests_per_s=10)
    while accepted(limiter):
        await processes.renew()
    await processes.renew()
    assert not accepted(limiter)
    calls = [processes.leases[0].calls]
    for _ in range(3):
        processes.advance(0.06)
        await processes.renew()
        calls.append(processes.leases[0].calls)
    assert calls == [calls[0], calls[0], calls[0] + 1, calls[0] + 1]


async def test_requests_during_a_renewal_count(start: Start) -> None:
    processes, received = start(1), list[bool]()
    limiter = processes.limiter(requests_per_s=50)
    accepted(limiter)
    await processes.renew()
    processes.leases[0].on_leased = lambda: received.extend(accepted(limiter) for _ in range(20))
    for _ in range(20):
        received.extend(accepted(limiter) for _ in range(30))
        await processes.renew()
    assert sum(received) <= 50


async def test_long_chunk_is_accepted_and_delays_later_requests(start: Start) -> None:
    processes = start(2)
    first, second = (processes.limiter(at, events_per_s=10) for at in range(2))
    assert accepted(first)
    await processes.renew()
    assert accepted(first, events=50)
    rejection = first.rejection()
    assert rejection is not None
    facts = {**rejection.facts}
    assert 3.5 < facts.pop("retry_after_s") < 4.3
    assert facts == {"key": KEY, "limit": "events_per_s", "allowed": 10.0}
    # the other process learns of it when it renews its own lease
    accepted(second)
    await processes.renew()
    await processes.renew()
    rejection = second.rejection()
    assert rejection is not None
    # of two processes, each gets half of the rate
    assert 3 < rejection.facts["retry_after_s"] < 4.5
    processes.advance(2)
    await processes.renew()
    assert not accepted(first)
    assert not accepted(second)
    processes.advance(4)
    await processes.renew()
    assert accepted(first)


async def test_leases_of_idle_and_crashed_processes_return_to_the_bucket(start: Start) -> None:
    processes = start(2)
    first, second = (processes.limiter(at, requests_per_s=100) for at in range(2))
    accepted(first)
    assert first.is_active
    await processes.renew()
    # one half is leased to the first; it crashes
    processes.all, crashed = processes.all[1:], processes.all[0]
    accepted(second)
    await processes.renew()
    assert sum(accepted(second) for _ in range(100)) < 50
    for _ in range(2):
        processes.advance(1)
        await processes.renew()
    processes.advance(1)
    count = 0
    for _ in range(4):
        await processes.renew()
        count += sum(accepted(second) for _ in range(100))
    assert count > 80
    # idle limiters cost nothing
    processes.advance(1)
    processes.all = [crashed, *processes.all]
    for _ in range(3):
        processes.advance(1)
        await processes.renew()
    calls = [each.calls for each in processes.leases]
    processes.advance(1)
    await processes.renew()
    assert [each.calls for each in processes.leases] == calls
    assert not first.is_active
    assert not second.is_active


async def test_lease_does_not_outlive_a_store_clock_that_is_set_back(start: Start) -> None:
    processes = start(2)
    request = LeaseRequest(f"{KEY}:requests_per_s", 1.0, 1.0, 0.0)
    first, second = processes.leases
    assert await first.lease([request]) == [Lease(1.0, 0.0, 1)]
    processes.set_store_clock(-30)
    assert await second.lease([request]) == [Lease(1.0, 0.0, 1)]


async def test_a_process_accepts_its_share_of_the_rate_while_the_store_is_unavailable(
    start: Start,
) -> None:
    processes = start(2)
    await send(processes, 40.0, 3, [1.0, 1.0], 3)
    for each in processes.leases:
        each.is_away = True
    with capture_logs() as lines:
        _, received, _ = await send(processes, 40.0, 3, [1.0, 1.0], 10)
    assert 0.85 <= received / (40 * 10) <= 1.1
    assert [line["event"] for line in lines] == ["rate_leases_not_renewed"] * 2
    for each in processes.leases:
        each.is_away = False
    _, received, seconds = await send(processes, 40.0, 3, [1.0, 1.0], 10)
    assert 0.85 <= received / (40 * seconds) <= 1.15


async def test_concurrent_requests_are_counted_until_they_end(start: Start) -> None:
    limiter = start(1).limiter(concurrent_requests=2)
    with limiter.request(1):
        with limiter.request(1):
            assert not accepted(limiter)
        with pytest.raises(ZeroDivisionError), limiter.request(1):
            _ = 1 / 0
        assert accepted(limiter)
    assert accepted(limiter)


async def test_changed_limit_keeps_the_counts_of_other_limits(start: Start) -> None:
    processes = start(1)
    (limiters,) = processes.all
    before = limiters.limiter(KEY, KeyLimits(concurrent_requests=1))
    assert before is not None
    before.begin(1)
    before.end()
    await limiters.renew()
    before = limiters.limiter(KEY, KeyLimits(requests_per_s=0.01, concurrent_requests=1))
    assert before is not None
    assert before.rejection() is None
    before.begin(1)
    after = limiters.limiter(KEY, KeyLimits(requests_per_s=0.01, concurrent_requests=2))
    assert after is not None
    rejection = after.rejection()
    assert rejection is not None
    assert rejection.facts["limit"] == "requests_per_s"
    await limiters.renew()
    assert processes.leases[0].calls == 1
    assert limiters.limiter(KEY, None) is None
    assert limiters.limiter("1" * 12, KeyLimits()) is None
