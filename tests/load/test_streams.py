"""Every wrong answer of a service is detected, and no correct one is reported as wrong.

The streams are fed here without Locust, and answered by a service in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from random import Random
from typing import Any

import numpy as np
import orjson
import pytest

from carry_client import ModelDescription, Output, Problem, read_problem
from tests.load.feeds import Chunk, InputsFeed
from tests.load.streams import (
    Applied,
    LoadStream,
    Streams,
    WrongAnswerError,
)

pytestmark = pytest.mark.harness

MODEL = ModelDescription(
    name="probe",
    version="0123456789ab",
    runtimes=("numpy",),
    codes=(0, 4),
    fields=None,
    outputs=(Output("out", (2,), False),),
    is_cut_invariant=True,
    max_body_bytes=100_000,
    max_chunk_steps=50,
    max_predict_steps=1000,
)
FEED = InputsFeed(MODEL, 200, 1)
EVERY = 3
Json = dict[str, Any]
Answer = Callable[[str, Json], Any]


def problem(status: int, code: str, **members: Any) -> Problem:
    return read_problem(status, {"code": code, "retryable": status == 503, **members})


NO_ANSWER = Problem(0, "no_answer", is_retryable=True)
OVERLOADED = problem(503, "overloaded")


@dataclass
class StoredStream:
    """A stream of the service: its events so far, its tag, and the last reply."""

    rows: list[Any] = field(default_factory=list)
    tag: bytes = bytes(16)
    reply: Json = field(default_factory=dict)


class Service:
    """A service in memory, whose outputs are sums of the events so far; one client feeds it.

    `script` answers the first chunks, `answer` the others.
    """

    def __init__(self, *script: Problem | Answer, **options: Any) -> None:
        options = {"model": MODEL, "appends": False, "capacity": 1, **options}
        self.script = list(script)
        self.answer: Answer = self.apply
        self.stored: dict[str, StoredStream] = {}
        self.bodies: list[bytes] = []
        self.failures: list[str] = []
        self.streams = Streams(
            feeds=[FEED], prefix="s", random=Random(5), stream_events=100, **options
        )

    def run(self, chunks: int, steps: tuple[int, int] = (4, 4)) -> LoadStream:
        """Send chunks; the first stream."""
        turns = self.streams.new_turns()
        for _ in range(chunks):
            try:
                self.streams.send(turns, steps, self.post, sleep=lambda _: None)
            except Problem as failure:
                self.failures.append(failure.code)
        return self.streams.every[0]

    def compare(self) -> int:
        return self.streams.compare(self.recompute, 16)

    def post(self, path: str, body: bytes) -> Any:
        self.bodies.append(body)
        step = self.script.pop(0) if self.script else self.answer
        if isinstance(step, Problem):
            raise replace(step)
        return step(path, orjson.loads(body))

    def recompute(self, path: str, body: bytes) -> Any:
        """What the second computation asks for."""
        document = orjson.loads(body)
        if path.endswith("/chunks"):
            return self.apply(path, document)
        rows = document["sequences"][0]["inputs"]
        return {"predictions": [{"outputs": {"out": np.cumsum(rows, axis=0).tolist()}}]}

    def apply(self, path: str, document: Json) -> Json:
        """The correct reply to a chunk, its tag by the protocol's reference."""
        stream = self.stored.setdefault(path, StoredStream())
        rows, start = document["inputs"], len(stream.rows)
        position = document.get("position", start)
        if position == start - len(rows) and stream.reply:
            return {**stream.reply, "replayed": True}
        if position != start:
            raise problem(409, "position_ahead", position=start, tag=stream.tag.hex())
        digest = sha256(b"I" + struct.pack("<Q", len(rows)) + np.array(rows, "<f4").tobytes())
        stream.tag = sha256(stream.tag + struct.pack("<Q", start) + digest.digest()).digest()[:16]
        stream.rows += rows
        stream.reply = {
            "model": "probe",
            "version": MODEL.version,
            "stream": path.split("/")[-2],
            "epoch": "ab" * 8,
            "position": start + len(rows),
            "tag": stream.tag.hex(),
            "outputs": {"out": np.cumsum(stream.rows, axis=0)[start:].tolist()},
            "replayed": False,
            **({"created": True} if start == 0 else {}),
        }
        return stream.reply

    def change(self, change: Callable[[Service, str, Json], Json]) -> None:
        """Every third chunk goes wrong, but not a stream's first."""

        def answer(path: str, document: Json) -> Json:
            is_due = len(self.bodies) % EVERY == 0 and path in self.stored
            reply = self.apply(path, document)
            return {**reply, **change(self, path, reply)} if is_due else reply

        self.answer = answer


def nudge(service: Service, path: str, reply: Json) -> Json:
    first, *others = reply["outputs"]["out"]
    return {"outputs": {"out": [[first[0] + 1e-3, first[1]], *others]}}


def swap(service: Service, path: str, reply: Json) -> Json:
    return {"outputs": next(s.reply["outputs"] for p, s in service.stored.items() if p != path)}


def lose_stream(service: Service, path: str, reply: Json) -> Json:
    del service.stored[path]
    return {}


def put(**members: Any) -> Callable[[Service, str, Json], Json]:
    return lambda service, path, reply: members


WRONG_ANSWERS: dict[str, tuple[Callable[[Service, str, Json], Json], str]] = {
    "a wrong output": (nudge, "wrong_outputs"),
    "another stream's outputs": (swap, "wrong_outputs"),
    "one output too few": (put(outputs={"out": [[0.0, 0.0]] * 3}), "unreadable"),
    "an infinite output": (put(outputs={"out": [[float("inf"), 0.0]] * 4}), "wrong_outputs"),
    "another position": (put(position=7), "wrong_position"),
    "another stream's name": (put(stream="other"), "wrong_stream"),
    "another epoch": (put(epoch="0" * 16), "wrong_epoch"),
    "another history": (put(tag="0" * 32), "wrong_tag"),
    "a replay of nothing": (put(replayed=True), "wrong_replay"),
    "a second beginning": (put(created=True), "wrong_beginning"),
    "no outputs at all": (put(outputs=None), "unreadable"),
    "a lost stream": (lose_stream, "position_ahead"),
}
"""What a reply is changed by, and the code of the wrong answer that must be detected."""


@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_wrong_answer_is_detected(name: str) -> None:
    change, code = WRONG_ANSWERS[name]
    service = Service(capacity=3)
    service.change(change)
    service.run(30)
    service.compare()
    assert set(service.streams.wrong_answers) == {code}
    assert service.streams.examples[code]


@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("is_cut_invariant", [False, True])
def test_correct_service_has_no_wrong_answers(appends: bool, is_cut_invariant: bool) -> None:
    model = replace(MODEL, is_cut_invariant=is_cut_invariant)
    service = Service(model=model, appends=appends, capacity=3)
    service.run(40, (1, 50))
    compared = service.compare()
    assert service.streams.wrong_answers == {}
    assert service.failures == []
    assert len(service.streams.every) > 3
    assert compared == sum(stream.sent for stream in service.streams.every)
    assert any(path.endswith(".again/chunks") for path in service.stored) != is_cut_invariant


@pytest.mark.parametrize(
    ("failure", "appends", "sent", "failures"),
    [
        (OVERLOADED, False, 3, []),
        (NO_ANSWER, False, 3, []),
        (problem(503, "outcome_unknown"), False, 3, []),
        (problem(422, "invalid_input"), False, 1, ["invalid_input"]),
        (OVERLOADED, True, 3, []),
        (NO_ANSWER, True, 1, ["no_answer"]),
    ],
)
def test_chunk_is_repeated_unchanged_unless_it_could_be_applied_twice(
    failure: Problem, appends: bool, sent: int, failures: list[str]
) -> None:
    service = Service(failure, failure, appends=appends)
    stream = service.run(1)
    assert len(service.bodies) == sent
    assert len(set(service.bodies)) == 1
    assert service.failures == failures
    assert service.streams.wrong_answers == {}
    assert stream.is_closed == bool(failures)
    assert stream.unknown_appends == (appends and bool(failures))


@pytest.mark.parametrize(
    ("spans", "unknown", "expected"),
    [
        ([(4, 6), (0, 4), (6, 9)], 0, 3),
        ([(0, 4), (5, 6)], 0, "lost_chunk"),
        ([(0, 4), (3, 6)], 0, "doubled_chunk"),
        ([(0, 4), (5, 6)], 1, 1),
    ],
)
def test_appends_must_be_contiguous(
    spans: list[tuple[int, int]], unknown: int, expected: int | str
) -> None:
    stream = LoadStream(MODEL, "s", FEED, appends=True, unknown_appends=unknown)
    stream.applied = [Applied(Chunk(0, end - start, 0), start, None) for start, end in spans]
    if isinstance(expected, str):
        with pytest.raises(WrongAnswerError, match=expected):
            stream.history()
    else:
        assert len(stream.history()) == expected
