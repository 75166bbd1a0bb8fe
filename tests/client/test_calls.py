"""Attempts of a call: headers, deadline and Retry-After, driven by hand with a manual clock."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from carry_client.calls import GRACE_S, Call, Session, Sleep
from carry_client.errors import NoAnswer, Problem
from carry_client.wire import Request, Response

REFUSED = NoAnswer(OSError("refused"))


class Driver:
    """Answers the requests of calls; sleeping advances the clock, and each attempt takes 1 s."""

    def __init__(self, *outcomes: Response | NoAnswer, **settings: Any) -> None:
        self.now_s = 100.0
        self.sent: list[Request] = []
        self.slept: list[float] = []
        self._outcomes = outcomes
        self.session = Session(clock=lambda: self.now_s, random=Random(1), **settings)

    def run(self, call: Call[Any]) -> Any:
        try:
            effect = next(call)
            while True:
                if isinstance(effect, Sleep):
                    self.slept.append(effect.seconds)
                    self.now_s += effect.seconds
                    effect = call.send(None)
                    continue
                assert isinstance(effect, Request)
                self.sent.append(effect)
                self.now_s += 1
                outcome = self._outcomes[min(len(self.sent), len(self._outcomes)) - 1]
                is_error = isinstance(outcome, NoAnswer)
                effect = call.throw(outcome) if is_error else call.send(outcome)
        except StopIteration as stop:
            return stop.value


def response(status: int, body: bytes = b"", retry_after: str = "") -> Response:
    return Response(status, "application/json", body, retry_after)


def test_each_attempt_sends_how_long_the_client_waits() -> None:
    driver = Driver(REFUSED, REFUSED, response(200, b"[1]"), timeout_s=4, deadline_s=5)
    assert driver.run(driver.session.request("POST", "/x", {})) == [1]
    waits = [float(request.headers["carry-timeout"]) for request in driver.sent]
    assert waits == pytest.approx([4, 4 - driver.slept[0], 3 - sum(driver.slept)], abs=1e-3)
    assert [each.timeout_s for each in driver.sent] == pytest.approx(
        [wait + GRACE_S for wait in waits], abs=1e-3
    )


def test_no_attempt_begins_after_the_deadline() -> None:
    driver = Driver(REFUSED, deadline_s=20)
    with pytest.raises(NoAnswer):
        driver.run(driver.session.request("GET", "/x"))
    assert driver.now_s <= 120 + 1
    assert "carry-timeout" not in driver.sent[0].headers


def test_retry_after_of_a_response_without_document_is_honoured() -> None:
    driver = Driver(response(503, b"busy", "7"), response(200, b"[1]"))
    driver.run(driver.session.request("GET", "/x"))
    assert driver.slept == [7]


def test_longer_retry_after_than_the_deadline_fails_at_once() -> None:
    driver = Driver(response(429, b'{"retry_after_s": 50}'), deadline_s=20)
    with pytest.raises(Problem, match="status_429"):
        driver.run(driver.session.request("GET", "/x"))
    assert driver.slept == []


def test_problem_that_is_not_retryable_is_raised_at_once() -> None:
    driver = Driver(response(422, b'{"code": "invalid_input", "retryable": false}'))
    with pytest.raises(Problem, match="invalid_input"):
        driver.run(driver.session.request("POST", "/x", {}))
    assert len(driver.sent) == 1
