"""Streams of a load: deliver chunks, check replies, compare outputs, and limits for the verdict.

With a position a chunk is repeated after every retryable problem, until the time limit. Without
one it is repeated only where it was certainly not applied. `position_ahead`, `position_behind` and
`already_applied` are wrong answers to a client that has its streams to itself and got every reply.

    |a - b| <= 1e-5 + 1e-5 |b|        a: received, chunk by chunk, under load; b: recomputed

The same service computes a stream's whole history once more: in one `/predict` call, which has no
streams, no chunks and no stored state; or, for a model whose outputs depend on the cuts, as the
same chunks on a second stream.
"""

from argparse import ArgumentTypeError
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from carry_client import (
    POSITION_CODES,
    ModelDescription,
    Problem,
    Retry,
    encode_body,
    model_path,
    stream_path,
)
from carry_client.replies import read_reply
from tests.load.feeds import FIRST_TAG, Chunk, Feed, longest_request, next_tag

NEW_STREAM_SHARE = 0.5
"""How often a new stream is created, while there may be more, instead of taking the one that has
waited longest: so that even a short run loads states that were not used for long."""
EXAMPLES_PER_CODE, EXAMPLE_CHARS = 3, 500
BOUND = 1e-5
RETRY_S = 30.0  # how long one chunk is tried
EXAMPLE = "flights"
"""The model of `make run` that is loaded by default."""
Limits = dict[str, float | None]  # limit by name: `max_...` or `min_...`; None disables it
DEFAULTS: Limits = {
    "max_error_share": 0.0,
    "max_retry_share": 0.01,
    "max_p95_ms": 250.0,
    "max_p99_ms": 500.0,
    "min_compared_events": 100.0,
}
NAMES = (*DEFAULTS, "min_chunks_per_s", "min_rate_share")

Post = Callable[[str, bytes], Any]
"""Sends a body to a path and returns the document; raises `Problem`."""


class WrongAnswerError(Problem):
    """A wrong answer: a stable code, and what was expected and received."""

    def __init__(self, code: str, detail: str):
        super().__init__(0, code, detail)


class Applied(NamedTuple):
    """An acknowledged chunk: the position of its first event, and its outputs, float32 [T, O].

    The outputs are None where the reply was not received.
    """

    chunk: Chunk
    start: int
    outputs: NDArray[np.float32] | None

    @property
    def end(self) -> int:
        """The position after it."""
        return self.start + self.chunk.steps


@dataclass(slots=True, eq=False)
class LoadStream:
    """A stream and all its acknowledged chunks."""

    model: ModelDescription
    name: str
    feed: Feed
    appends: bool  # chunks have no position, and many are in flight
    sent: int = 0  # events in chunks, acknowledged or not
    position: int = 0  # by the last reply; unused for appends, like the tag
    epoch: str = ""
    tag: bytes = FIRST_TAG
    unknown_appends: int = 0  # which may or may not have been applied
    is_closed: bool = False  # because of its age or a failure
    applied: list[Applied] = field(default_factory=list)

    def send(self, chunk: Chunk, post: Post, retry: Retry) -> None:
        """Send a chunk until it is applied; raises Problem where it was rejected, abandoned, or
        answered wrongly."""
        position = {} if self.appends else {"position": self.position}
        body = orjson.dumps({**position, self.feed.member: self.feed.events(chunk)})
        path = f"{stream_path(self.model.name, self.name)}/chunks"

        def attempt() -> Any:
            try:
                return post(path, body)
            except Problem as problem:
                problem.is_retryable &= problem.code not in POSITION_CODES
                problem.is_retryable &= problem.was_not_applied or not self.appends
                raise

        try:
            reply = retry.run(attempt)
        except Problem as problem:
            if problem.code not in POSITION_CODES:
                self.unknown_appends += self.appends and not problem.was_not_applied
                raise
            # the rejection itself is the last failure: it may follow from an earlier attempt
            is_applied = problem.code == "already_applied" and retry.failures > 1
            if self.appends or not is_applied or problem.position != self.position + chunk.steps:
                detail = f"chunk at {self.position}: {problem.detail}"
                raise self.wrong(problem.code, detail) from problem
            tag = next_tag(self.tag, self.position, self.feed, chunk)
            self._append(chunk, self.position, tag, None)
        else:
            self._accept(chunk, reply, is_retry=retry.failures > 0)

    def _accept(self, chunk: Chunk, document: Any, *, is_retry: bool) -> None:
        """Record a correct reply, which may be the stored one after a retry."""
        try:
            reply = read_reply(self.model, document, 0)
            outputs = self.model.pack(reply.outputs, chunk.steps)
        except (Problem, ValueError) as error:
            raise self.wrong("unreadable", str(error)) from error
        position, epoch, tag = reply.head
        start = position - chunk.steps if self.appends else self.position
        own_tag = b"" if self.appends else next_tag(self.tag, start, self.feed, chunk)
        names = document.get("model"), reply.stream
        may_be_created = reply.is_created == (start == 0) or (start == 0 and reply.is_replayed)
        for code, is_right, received in (
            ("wrong_stream", names == (self.model.name, self.name), names),
            ("wrong_position", position == start + chunk.steps and start >= 0, position),
            ("wrong_epoch", self.epoch in ("", epoch), epoch),
            ("wrong_replay", is_retry or not reply.is_replayed, reply.is_replayed),
            ("wrong_beginning", may_be_created, reply.is_created),
            ("wrong_tag", not own_tag or tag == own_tag.hex(), tag),
            ("wrong_outputs", np.isfinite(outputs).all(), outputs),
        ):
            if not is_right:
                raise self.wrong(code, f"chunk of {chunk.steps} at {start}: got {received}")
        self.epoch = epoch
        self._append(chunk, start, own_tag, outputs)

    def _append(self, chunk: Chunk, start: int, tag: bytes, outputs: Any) -> None:
        self.applied.append(Applied(chunk, start, outputs))
        self.position, self.tag = start + chunk.steps, tag

    def history(self) -> list[Applied]:
        """The acknowledged chunks from position 0, without a gap; raises WrongAnswerError.

        Those of appends must be contiguous in the order of their positions; after an append of
        unknown outcome the history ends at the first gap.
        """
        history: list[Applied] = []
        position = 0
        for each in sorted(self.applied, key=lambda applied: applied.start):
            if each.start > position and self.unknown_appends:
                break
            if each.start != position:
                code = "lost_chunk" if each.start > position else "doubled_chunk"
                detail = f"chunks end at {position}, the next acknowledged one is at {each.start}"
                raise self.wrong(code, detail)
            history.append(each)
            position = each.end
        return history

    def recompute(self, history: Sequence[Applied], post: Post) -> NDArray[np.float32]:
        """The outputs of its first chunks, computed a second time, float32 [T, O]."""
        model, feed = self.model, self.feed
        if model.is_cut_invariant:
            events = [event for each in history for event in feed.events(each.chunk)]
            body = encode_body("json", {"sequences": [{feed.member: events}]})
            (prediction,) = post(f"{model_path(model.name)}/predict", body)["predictions"]
            return model.pack(prediction["outputs"], len(events))
        path, parts = f"{stream_path(model.name, f'{self.name}.again')}/chunks", []
        for each in history:
            chunk = {"position": each.start, feed.member: feed.events(each.chunk)}
            outputs = post(path, encode_body("json", chunk))["outputs"]
            parts.append(model.pack(outputs, each.chunk.steps))
        return np.concatenate(parts)

    def wrong(self, code: str, detail: str) -> WrongAnswerError:
        """A wrong answer of this stream."""
        return WrongAnswerError(code, f"stream {self.name!r}: {detail}")


@dataclass(slots=True)
class Streams:
    """All streams of a scenario, and its failures."""

    model: ModelDescription
    feeds: list[Feed]
    prefix: str  # of every stream's name
    random: Random
    stream_events: int  # after which a stream is replaced by a new one
    appends: bool  # all users send to the same streams at once, without positions
    capacity: int  # streams that a user keeps in turn; that all users share where they append
    every: list[LoadStream] = field(default_factory=list)
    shared: deque[LoadStream] = field(default_factory=deque)
    wrong_answers: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)  # first failures by code

    def new_turns(self) -> deque[LoadStream]:
        """The streams that a new user keeps in turn."""
        return self.shared if self.appends else deque()

    def take_turn(self, turns: deque[LoadStream]) -> LoadStream:
        """The next stream in turn: one that has waited longest, or a new one."""
        while turns and turns[0].is_closed:
            turns.popleft()
        has_room = len(turns) < self.capacity
        if not turns or (has_room and self.random.random() < NEW_STREAM_SHARE):
            number = len(self.every)
            feed = self.feeds[number % len(self.feeds)]
            turns.append(LoadStream(self.model, f"{self.prefix}{number}", feed, self.appends))
            self.every.append(turns[-1])
        else:
            turns.rotate(-1)
        return turns[-1]

    def send(
        self, turns: deque[LoadStream], steps: tuple[int, int], post: Post, **retry: Any
    ) -> None:
        """Send a chunk of some `steps` of the next stream, with further arguments of `Retry`, and
        record a failure before it is raised."""
        stream = self.take_turn(turns)
        count = self.random.randint(*steps)
        offset = self.random.randint(0, stream.feed.length - count)
        chunk = Chunk(offset, count, stream.sent)
        stream.sent += count
        stream.is_closed = stream.sent >= self.stream_events
        try:
            stream.send(chunk, post, Retry(RETRY_S, self.random, **retry))
        except Problem as failure:
            stream.is_closed = True
            self.add_failure(failure)
            raise

    def add_failure(self, failure: Problem) -> None:
        """Count a wrong answer, and keep an example of any failure."""
        if isinstance(failure, WrongAnswerError):
            self.wrong_answers[failure.code] += 1
        examples = self.examples.setdefault(failure.code, [])
        if len(examples) < EXAMPLES_PER_CODE:
            examples.append(failure.detail[:EXAMPLE_CHARS])

    def compare(self, post: Post, max_streams: int) -> int:
        """Check every history, and the outputs of `max_streams` at most, drawn evenly from all; how
        many events were compared."""
        histories, events = {}, 0
        for stream in self.every:
            try:
                histories[stream] = stream.history()
            except WrongAnswerError as error:
                self.add_failure(error)
        candidates = [stream for stream, history in histories.items() if history]
        for stream in self.random.sample(candidates, min(max_streams, len(candidates))):
            limit = longest_request(self.model, stream.feed.event_bytes)
            history = [each for each in histories[stream] if each.end <= limit]
            received = [each for each in history if each.outputs is not None]
            wanted = stream.recompute(history, post) if received else None
            for each in received:
                events += each.chunk.steps
                difference = np.abs(each.outputs - wanted[each.start : each.end])
                excess = difference - BOUND * np.abs(wanted[each.start : each.end])
                if not (excess <= BOUND).all():
                    detail = f"chunk at {each.start}: |a-b| - 1e-5|b| is up to {excess.max():.2e}"
                    self.add_failure(stream.wrong("wrong_outputs", detail))
        return events


class Check(NamedTuple):
    """One threshold: its limit, the value (None: nothing was measured), and whether it passed."""

    name: str
    limit: float
    value: float | None
    passed: bool

    def __str__(self) -> str:
        value = "nothing measured" if self.value is None else f"{self.value:,.6g}"
        verdict = "passed" if self.passed else "FAILED"
        return f"{self.name:20} {self.limit:>10,.6g}  {verdict}  {value}"


def default_model(served: list[str]) -> str:
    """The only model, or the one of the README; empty if there is neither."""
    if len(served) == 1:
        return served[0]
    return EXAMPLE if EXAMPLE in served else ""


def parse_threshold(text: str) -> tuple[str, str, float | None]:
    """Scenario (empty for all), name and limit of `NAME=VALUE` or `SCENARIO.NAME=VALUE`; the value
    `none` disables it."""
    left, _, value = text.partition("=")
    scenario, _, name = left.rpartition(".")
    if name not in NAMES:
        raise ArgumentTypeError(f"{text}: expected one of {', '.join(NAMES)}")
    try:
        return scenario, name, None if value == "none" else float(value)
    except ValueError:
        raise ArgumentTypeError(f"{text}: expected a number or none") from None


def check_limits(limits: Limits, values: Mapping[str, float | None]) -> list[Check]:
    """The result of every threshold; a value that is missing fails."""
    checks = []
    for name, limit in limits.items():
        value = values[name]
        if limit is not None:
            is_right = value is not None and (
                value <= limit if name[:3] == "max" else value >= limit
            )
            checks.append(Check(name, limit, value, is_right))
    return checks
