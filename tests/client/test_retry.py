"""Retries, problems and paths of the HTTP client, without a service."""

from __future__ import annotations

from random import Random

import orjson
import pytest

from carry_client import (
    AsyncCarry,
    Carry,
    Problem,
    Retry,
    read_problem,
    read_response,
    stream_path,
)

BUSY = read_problem(503, {"code": "overloaded", "retryable": True})


class Clock:
    """A clock that only sleeping advances."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds

    def retry(self, limit_s: float) -> Retry:
        return Retry(limit_s, Random(1), clock=lambda: self.now_s, sleep=self.sleep)


def failing(times: int, problem: Problem = BUSY) -> list[Problem]:
    return [problem] * times


def run(clock: Clock, problems: list[Problem], limit_s: float = 60.0) -> str:
    def attempt() -> str:
        if problems:
            raise problems.pop()
        return "done"

    return clock.retry(limit_s).run(attempt)


def test_backoff_grows_with_jitter_up_to_two_seconds() -> None:
    clock = Clock()
    assert run(clock, failing(10)) == "done"
    longest = [min(2.0, 0.05 * 2**failure) for failure in range(10)]
    assert all(0.5 * most <= s <= most for s, most in zip(clock.slept, longest, strict=True))
    assert len(set(clock.slept)) == 10


@pytest.mark.parametrize(("seconds", "expected_s"), [(3, 3), (100, 60)])
def test_retry_after_is_a_lower_bound_within_the_limit(seconds: int, expected_s: int) -> None:
    clock = Clock()
    run(clock, failing(1, read_problem(429, {"retry_after_s": seconds})))
    assert clock.slept == [expected_s]


def test_last_attempt_is_at_the_time_limit() -> None:
    clock = Clock()
    with pytest.raises(Problem, match="overloaded"):
        run(clock, failing(1000), limit_s=7.0)
    assert clock.now_s == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("status", "body", "code", "is_retryable"),
    [
        (200, b"<html>", "unreadable_reply", False),
        (404, b"<html>", "status_404", False),
        (502, b"<html>", "status_502", True),
        (503, b'{"code": "outcome_unknown", "retryable": false}', "outcome_unknown", False),
    ],
)
def test_response_without_a_reply_is_a_problem(
    status: int, body: bytes, code: str, is_retryable: bool
) -> None:
    with pytest.raises(Problem) as caught:
        read_response(status, "application/json", body)
    assert (caught.value.code, caught.value.is_retryable) == (code, is_retryable)


def test_position_problem_names_the_position() -> None:
    document = {"code": "already_applied", "position": 7}
    with pytest.raises(Problem) as caught:
        read_response(409, "application/problem+json", orjson.dumps(document))
    assert caught.value.has_stream_position
    assert caught.value.position == 7


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_stream_name_that_is_another_path_is_rejected(name: str) -> None:
    assert stream_path("m", "a b") == "/v1/models/m/streams/a%20b"
    with pytest.raises(Problem, match="expected 1 to 256 characters"):
        stream_path("m", name)


@pytest.mark.parametrize("client", [Carry, AsyncCarry])
@pytest.mark.parametrize("url", ["ftp://here", "here:8000", "http://", ""])
def test_an_invalid_address_is_rejected_before_any_request(
    client: type[Carry] | type[AsyncCarry], url: str
) -> None:
    with pytest.raises(Problem, match="expected an address such as http") as raised:
        client(url)
    assert not raised.value.is_retryable
