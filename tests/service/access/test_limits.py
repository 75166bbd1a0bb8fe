"""Limits of a key: rates that hold on average, and concurrent requests."""

from __future__ import annotations

import pytest

from service.access.keys import AccessKey, AccessKeyError, decode_key, encode_key
from service.access.limits import KeyLimiter, KeyLimiters, KeyLimits
from service.access.principal import Verb
from service.core.errors import LimitExceeded


class Clock:
    """A monotonic clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def limiter_of(clock: Clock, **limits: float) -> KeyLimiter:
    limiter = KeyLimiters(clock).limiter("0" * 12, KeyLimits(**limits))
    assert limiter is not None
    return limiter


def accepted(limiter: KeyLimiter, events: int = 1) -> bool:
    """Whether a request is accepted, which then ends at once."""
    try:
        with limiter.request(events):
            return True
    except LimitExceeded:
        return False


@pytest.mark.parametrize("rate_per_s", [0.5, 3.0, 40.0])
def test_requests_of_a_minute_are_those_of_the_rate_and_one_burst(
    clock: Clock, rate_per_s: float
) -> None:
    limiter = limiter_of(clock, requests_per_s=rate_per_s)
    count = 0
    for _ in range(60 * 64):
        count += accepted(limiter)
        clock.now_s += 1 / 64
    assert 60 * rate_per_s <= count <= 60 * rate_per_s + max(1, rate_per_s) + 1


def test_burst_is_limited_to_one_second_of_the_rate(clock: Clock) -> None:
    limiter = limiter_of(clock, requests_per_s=5)
    clock.now_s += 3600
    assert [accepted(limiter) for _ in range(7)] == [True] * 5 + [False] * 2


def test_long_chunk_is_accepted_and_delays_later_requests(clock: Clock) -> None:
    limiter = limiter_of(clock, events_per_s=10)
    assert accepted(limiter, events=50)
    rejection = limiter.rejection()
    assert rejection is not None
    assert rejection.facts == {
        "key": "0" * 12,
        "limit": "events_per_s",
        "allowed": 10.0,
        "retry_after_s": 4.1,
    }
    clock.now_s += 4.05
    assert not accepted(limiter)
    clock.now_s += 0.06
    assert accepted(limiter)


def test_concurrent_requests_are_counted_until_they_end(clock: Clock) -> None:
    limiter = limiter_of(clock, concurrent_requests=2)
    with limiter.request(1):
        with limiter.request(1):
            assert not accepted(limiter)
        with pytest.raises(ZeroDivisionError), limiter.request(1):
            _ = 1 / 0
        assert accepted(limiter)
    assert accepted(limiter)


def test_changed_limit_keeps_the_counts_of_other_limits(clock: Clock) -> None:
    limiters = KeyLimiters(clock)
    before = limiters.limiter("0" * 12, KeyLimits(requests_per_s=1, concurrent_requests=1))
    assert before is not None
    before.begin(1)
    after = limiters.limiter("0" * 12, KeyLimits(requests_per_s=1, concurrent_requests=2))
    assert after is not None
    rejection = after.rejection()
    assert rejection is not None
    assert rejection.facts["limit"] == "requests_per_s"
    assert limiters.limiter("0" * 12, None) is None
    assert limiters.limiter("1" * 12, KeyLimits()) is None


def test_record_of_a_key_has_its_limits_and_only_valid_ones() -> None:
    limits = KeyLimits(requests_per_s=0.5, concurrent_requests=3)
    key = AccessKey(
        name="a", verbs=(Verb.LIST,), models=("*",), prefix="", created_ms=0, limits=limits
    )
    record = encode_key(key)
    assert decode_key(record).principal("0" * 12).limits == limits
    for wrong in (b"-1", b"0", b'"x"'):
        with pytest.raises(AccessKeyError, match="requests_per_s"):
            decode_key(record.replace(b"0.5", wrong))
    with pytest.raises(AccessKeyError, match="per_day"):
        decode_key(record.replace(b"requests_per_s", b"requests_per_day"))
