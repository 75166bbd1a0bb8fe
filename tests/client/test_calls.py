"""Attempts of a call: headers, deadline and Retry-After, driven by hand with a manual clock."""

from __future__ import annotations

import json
import logging
from random import Random
from typing import Any

import pytest

from carry_client.calls import GRACE_S, Call, Emit, Session, Sleep
from carry_client.errors import NoAnswer, Problem, StateChanged, StreamExists
from carry_client.many_streams import send_many
from carry_client.models import ModelCore
from carry_client.replies import StreamState
from carry_client.retry import Retry
from carry_client.streams import StreamCore
from carry_client.types import Head
from carry_client.wire import Request, Response

REFUSED = NoAnswer(OSError("refused"))


class Driver:
    """Answers the requests of calls; sleeping advances the clock, and each attempt takes 1 s."""

    def __init__(self, *outcomes: Response | NoAnswer, **settings: Any) -> None:
        self.now_s = 100.0
        self.sent: list[Request] = []
        self.slept: list[float] = []
        self.values: list[Any] = []
        self._outcomes = outcomes
        self.session = Session(clock=lambda: self.now_s, random=Random(1), **settings)

    def run(self, call: Call[Any]) -> Any:
        try:
            effect = next(call)
            while True:
                if isinstance(effect, Emit):
                    self.values.append(effect.value)
                    effect = call.send(None)
                    continue
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

    def emitted(self, call: Call[None]) -> list[Any]:
        self.run(call)
        return self.values


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


def test_a_client_warns_once_that_it_retries_without_an_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = Driver(REFUSED, REFUSED, response(200, b"[1]"), REFUSED, response(200, b"[1]"))
    with caplog.at_level(logging.WARNING, "carry_client"):
        driver.run(driver.session.request("GET", "/x"))
        driver.run(driver.session.request("GET", "/x"))
    assert len(driver.sent) == 5
    (line,) = caplog.messages
    assert line == f"{REFUSED}; retrying until 120 s after the first attempt"


def test_backoff_grows_with_jitter_up_to_two_seconds() -> None:
    driver = Driver(*[REFUSED] * 10, response(200, b"[1]"))
    driver.run(driver.session.request("GET", "/x"))
    longest = [min(2.0, 0.05 * 2**failure) for failure in range(10)]
    assert all(0.5 * most <= s <= most for s, most in zip(driver.slept, longest, strict=True))
    assert len(set(driver.slept)) == 10


@pytest.mark.parametrize("retry_after_s", [0, 100])
def test_last_attempt_is_at_the_time_limit(retry_after_s: float) -> None:
    now_s = [0.0]

    def sleep(seconds: float) -> None:
        now_s[0] += seconds

    def attempt() -> None:
        raise Problem(503, "busy", is_retryable=True, retry_after_s=retry_after_s)

    with pytest.raises(Problem, match="busy"):
        Retry(7.0, Random(1), clock=lambda: now_s[0], sleep=sleep).run(attempt)
    assert now_s[0] == pytest.approx(7.0)


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


def stream_of(driver: Driver) -> StreamCore:
    return StreamCore(driver.session, ModelCore(driver.session, "m"), "s")


def exists(position: int, tag: str) -> Response:
    head = f'"epoch": "e2", "position": {position}, "tag": "{tag}"'
    return response(409, f'{{"code": "stream_exists", "retryable": false, {head}}}'.encode())


DESCRIPTION = json.dumps(
    {
        "name": "m",
        "version": "v",
        "runtimes": [],
        "columns": [],
        "events": None,
        "outputs": {},
        "chunking": "invisible",
        "limits": {"max_body_bytes": 1, "max_chunk_steps": 9, "max_predict_steps": 9},
    }
).encode()
STATE = StreamState("m", "other", Head(7, "e1", "ab"), "f" * 32, "events", {})
CREATED = response(200, b'{"epoch": "e2", "position": 7, "tag": "00"}')


def test_restore_whose_reply_was_lost_is_recognised() -> None:
    driver = Driver(REFUSED, exists(7, "00"), CREATED)
    restored = driver.run(stream_of(driver).restore(STATE, overwrite=False))
    assert restored == Head(7, "e2", "00")
    assert [request.method for request in driver.sent] == ["PUT", "PUT", "GET"]


@pytest.mark.parametrize(
    "outcomes",
    [
        (exists(7, "00"),),
        (REFUSED, exists(7, "cd")),
        (REFUSED, exists(8, "00")),
    ],
    ids=["at the first attempt", "with events", "elsewhere"],
)
def test_stream_of_others_is_not_taken_for_a_restored_one(
    outcomes: tuple[Response | NoAnswer, ...],
) -> None:
    driver = Driver(*outcomes)
    with pytest.raises(StreamExists):
        driver.run(stream_of(driver).restore(STATE, overwrite=False))


READ = response(200, b'{"epoch": "e1", "position": 9, "tag": "ab"}')


def changed(epoch: str, position: int, tag: str) -> Response:
    head = f'"epoch": "{epoch}", "position": {position}, "tag": "{tag}"'
    return response(412, f'{{"code": "state_changed", "retryable": false, {head}}}'.encode())


def test_rewind_whose_reply_was_lost_is_recognised() -> None:
    driver = Driver(READ, REFUSED, changed("e2", 7, "00"))
    stream = stream_of(driver)
    assert driver.run(stream.rewind(7)) == stream.head == Head(7, "e2", "00")
    rewinds = driver.sent[1:]
    assert [request.path for request in rewinds] == ["/v1/models/m/streams/s/rewind"] * 2
    assert {request.headers["if-match"] for request in rewinds} == {'"e1-ab"'}


@pytest.mark.parametrize(
    "outcomes",
    [
        (changed("e2", 7, "00"),),
        (REFUSED, changed("e2", 7, "cd")),
        (REFUSED, changed("e2", 8, "00")),
        (REFUSED, changed("e1", 7, "00")),
    ],
    ids=["at the first attempt", "with events", "elsewhere", "in the same epoch"],
)
def test_stream_that_others_changed_is_not_taken_for_a_rewound_one(
    outcomes: tuple[Response | NoAnswer, ...],
) -> None:
    driver = Driver(READ, *outcomes)
    stream = stream_of(driver)
    with pytest.raises(StateChanged):
        driver.run(stream.rewind(7))
    assert stream.head == Head(9, "e1", "ab")


def test_deletion_whose_reply_was_lost_counts_as_done() -> None:
    missing = response(404, b'{"code": "stream_not_found", "retryable": false}')
    for outcomes, existed in (((REFUSED, missing), True), ((missing,), False)):
        driver = Driver(*outcomes)
        assert driver.run(stream_of(driver).delete()) is existed


def test_unreadable_head_is_a_problem() -> None:
    driver = Driver(response(200, b'{"position": "seven"}'))
    with pytest.raises(Problem, match="unreadable_reply"):
        driver.run(stream_of(driver).refresh())


def test_streams_are_listed_page_by_page_and_once() -> None:
    driver = Driver(
        response(200, b'{"streams": ["a", "b"], "cursor": "next"}'),
        response(200, b'{"streams": ["b", "c"], "cursor": null}'),
    )
    assert driver.emitted(ModelCore(driver.session, "m").streams("")) == ["a", "b", "c"]
    assert [request.params.get("cursor") for request in driver.sent] == [None, "next"]


def test_unreadable_item_of_many_is_a_problem_of_its_own() -> None:
    missing = response(404, b'{"code": "stream_not_found", "retryable": false}')
    for result in (b"null", b'{"status": "x", "error": {}}', b'{"reply": {}}'):
        results = response(200, b'{"results": [%b]}' % result)
        driver = Driver(response(200, DESCRIPTION), missing, results)
        stream = stream_of(driver)
        outcomes = driver.run(send_many(stream.model, [(stream, [{"a": 1}])], {}))
        assert outcomes["s"].code == "unreadable_reply"


def described(**limits: int) -> Response:
    document = json.loads(DESCRIPTION)
    document["columns"] = [{"name": f"c{at}", "field": f"c{at}"} for at in range(10)]
    document["limits"] |= limits
    return response(200, json.dumps(document).encode())


@pytest.mark.parametrize(
    ("body_bytes", "expected"), [(10**6, 100), (48 * 10 * 7, 7), (100, 1)], ids=str
)
def test_chunks_fit_the_longest_body(body_bytes: int, expected: int) -> None:
    driver = Driver(described(max_body_bytes=body_bytes, max_chunk_steps=100))
    model = ModelCore(driver.session, "m")
    assert driver.run(model.chunk_events()) == expected


def test_request_for_many_streams_that_is_too_long_is_sent_in_halves() -> None:
    too_large = response(413, b'{"code": "body_too_large", "retryable": false}')
    missing = response(404, b'{"code": "stream_not_found", "retryable": false}')
    wrong = {"status": 422, "error": {"code": "invalid_input", "retryable": False}}
    one, two = [
        response(200, json.dumps({"results": [wrong] * count}).encode()) for count in (1, 2)
    ]
    driver = Driver(described(), *[missing] * 4, too_large, two, too_large, too_large, one)
    model = ModelCore(driver.session, "m")
    streams = [StreamCore(driver.session, model, f"s{at}") for at in range(4)]
    outcomes = driver.run(send_many(model, [(each, [{"a": 1}]) for each in streams], {}))
    codes = [outcomes[each.name].code for each in streams]  # type: ignore[union-attr]
    assert codes == ["invalid_input", "invalid_input", "body_too_large", "invalid_input"]
