"""Sends one chunk until its outcome is known, by the rules of docs/reference/protocol.md.

With a position a chunk is sent again after any failure that may pass (429, 503, a broken
connection), with the same position, until it is answered or patience is at an end. Without
one it is sent again only where the service said that nothing was applied.

`position_ahead`, `position_behind` and `already_applied` cannot come to a client that is alone
with its streams and was not cut off: then they are wrong answers. The stream goes on from where
the refusal says it stands, if that is a place in its own history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import orjson

from tests.load.description import Description
from tests.load.measures import Measures
from tests.load.scenarios import Scenario
from tests.load.streams import Fault, Population, Stream
from tests.load.tape import Chunk

NO_ANSWER = "no_answer"
NOTHING_APPLIED = (
    *("conflict", "overloaded", "deadline_exceeded"),
    *("store_unavailable", "store_refused", "shutting_down"),
)
STANDING = ("position_ahead", "position_behind", "already_applied")
BUSY_STATUSES = (429, 502, 503, 504)
FIRST_BACKOFF_S = 0.05
LONGEST_BACKOFF_S = 2.0
LONGEST_RETRY_AFTER_S = 5.0


class Answer(NamedTuple):
    """What came back; status 0, and the reason as the body, where nothing did."""

    status: int
    body: bytes
    server_timing: str | None = None


Post = Callable[[str, bytes], Answer]
"""Sends a body to a path, and never raises for what the service does."""


class Problem(NamedTuple):
    """Everything else than a reply."""

    code: str
    detail: str
    passes: bool
    retry_after_s: float
    document: Mapping[str, Any]


@dataclass(slots=True)
class Sender:
    """Sends a scenario's chunks; any number of greenlets call `send`.

    Attributes:
        patience_s: longest time from the first attempt to the last.
        clock: seconds, never going back.
    """

    model: Description
    scenario: Scenario
    population: Population
    measures: Measures
    random: Random
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    patience_s: float = 30.0
    _cuts: int = 0
    _cuts_of: Counter[int] = field(default_factory=Counter)

    def send(self, post: Post) -> None:
        """Send one chunk of the stream whose turn it is, and see it settled."""
        stream = self.population.take()
        try:
            self._settle(stream, self._cut(stream), post)
        finally:
            self.population.give_back(stream)

    def _cut(self, stream: Stream) -> Chunk:
        kinds = self.scenario.kinds
        self._cuts += 1
        # the kind that is furthest behind its share; all but the first begin half a chunk
        # behind, so that even a short run has some of the rare ones
        number = max(
            range(len(kinds)),
            key=lambda i: kinds[i].share * self._cuts - self._cuts_of[i] + (i > 0) / 2,
        )
        self._cuts_of[number] += 1
        kind = kinds[number]
        steps = self.random.randint(kind.min_steps, kind.max_steps)
        offset = self.random.randint(0, stream.tape.length - steps)
        chunk = Chunk(number, offset, steps, stream.sent)
        stream.sent += steps
        return chunk

    def _settle(self, stream: Stream, chunk: Chunk, post: Post) -> None:
        path = f"/v1/models/{self.model.name}/streams/{stream.name}/chunks"
        body = stream.body(chunk)
        began_s = self.clock()
        failures = 0
        while True:
            sent_s = self.clock()
            answer = post(path, body)
            now_s = self.clock()
            if answer.status == 200:
                self._answered(stream, chunk, answer, failures, now_s - began_s, now_s - sent_s)
                return
            problem = read_problem(answer)
            self.measures.problems[problem.code] += 1
            if problem.code in STANDING:
                self._refused(stream, chunk, problem, failures)
                return
            known = problem.code in NOTHING_APPLIED or answer.status == 429
            if stream.appends and not known:
                stream.doubtful += 1
            if not problem.passes or (stream.appends and not known):
                self._give_up(stream, problem)
                return
            if now_s - began_s >= self.patience_s:
                self._give_up(stream, problem)
                return
            failures += 1
            self.measures.retries += 1
            backoff_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (failures - 1))
            asked_s = min(problem.retry_after_s, LONGEST_RETRY_AFTER_S)
            self.sleep(max(backoff_s * self.random.uniform(0.5, 1.0), asked_s))

    def _answered(
        self,
        stream: Stream,
        chunk: Chunk,
        answer: Answer,
        failures: int,
        latency_s: float,
        attempt_s: float,
    ) -> None:
        try:
            reply = orjson.loads(answer.body)
        except ValueError:
            reply = None
        fault = stream.accept(self.model, chunk, reply, tried_before=failures > 0)
        if fault is None:
            timing = answer.server_timing
            self.measures.answer(chunk.kind, chunk.steps, latency_s, attempt_s, timing)
        else:
            self.measures.errors += 1
            self.measures.fault(fault)

    def _refused(self, stream: Stream, chunk: Chunk, problem: Problem, failures: int) -> None:
        after = stream.position + chunk.steps
        may_be_applied = problem.code == "already_applied" and failures and not stream.appends
        if may_be_applied and problem.document.get("position") == after:
            stream.skip(chunk)
            self.measures.skipped += 1
            return
        self.measures.errors += 1
        self.measures.fault(
            Fault(
                problem.code,
                f"stream {stream.name!r}, chunk at {stream.position}: {problem.detail}",
            )
        )
        if problem.code == "position_ahead" and not stream.appends:
            fault = stream.rewind(problem.document)
            if fault is not None:
                self.measures.fault(fault)
        else:
            stream.left = True

    def _give_up(self, stream: Stream, problem: Problem) -> None:
        stream.left = True
        self.measures.error(problem.code, f"stream {stream.name!r}: {problem.detail}")


def read_problem(answer: Answer) -> Problem:
    """A problem document, or whatever else came."""
    if answer.status == 0:
        return Problem(NO_ANSWER, answer.body.decode(errors="replace"), True, 0.0, {})
    try:
        document = orjson.loads(answer.body)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        document = {}
    retry_after_s = document.get("retry_after_s")
    busy = answer.status in BUSY_STATUSES
    return Problem(
        code=str(document.get("code", f"status_{answer.status}")),
        detail=str(document.get("detail", answer.body[:200].decode(errors="replace"))),
        passes=bool(document.get("retryable", busy)) or busy,
        retry_after_s=float(retry_after_s) if isinstance(retry_after_s, int | float) else 0.0,
        document=document,
    )
