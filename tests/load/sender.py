"""Sender: sends a scenario's chunks, retries them, and records what the replies are.

With a position a chunk is repeated after every retryable problem, until the time limit. Without
one it is repeated only where it was certainly not applied. `position_ahead`, `position_behind` and
`already_applied` are wrong answers to a client that has its streams to itself and got every reply.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from service.client import POSITION_CODES, ModelDescription, Problem, Retry, stream_path
from tests.load.feeds import Chunk, Feed
from tests.load.results import Results
from tests.load.scenarios import Scenario
from tests.load.stream import Fault, LoadStream

NEW_STREAM_SHARE = 0.5
"""How often a new stream is begun, while there may be more, instead of taking the one that has
waited longest: so that even a short run loads states that were not used for long."""

Post = Callable[[str, bytes], tuple[Any, str | None]]
"""Sends a body to a path: the document and the Server-Timing header; raises `Problem`."""


@dataclass(slots=True)
class Load:
    """State that all users of a scenario share.

    Attributes:
        prefix: of every stream's name.
        retry_s: how long one chunk is repeated.
        streams: all that were begun.
        shared: those that users share, where chunks are appended.
    """

    model: ModelDescription
    scenario: Scenario
    feeds: list[Feed]
    prefix: str
    results: Results
    random: Random
    retry_s: float = 30.0
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    streams: list[LoadStream] = field(default_factory=list)
    shared: deque[LoadStream] = field(default_factory=deque)
    cuts: int = 0
    cuts_by_kind: Counter[int] = field(default_factory=Counter)

    def begin_stream(self) -> LoadStream:
        """A new stream."""
        number = len(self.streams)
        feed = self.feeds[number % len(self.feeds)]
        self.streams.append(LoadStream(f"{self.prefix}{number}", feed, self.scenario.appends))
        return self.streams[-1]

    def cut(self, stream: LoadStream) -> Chunk:
        """The next chunk of a stream, of the kind that is furthest below its share."""
        kinds = self.scenario.kinds
        self.cuts += 1
        # all but the first kind start half a chunk below, so that a short run has rare ones too
        number = max(
            range(len(kinds)),
            key=lambda i: kinds[i].share * self.cuts - self.cuts_by_kind[i] + (i > 0) / 2,
        )
        self.cuts_by_kind[number] += 1
        steps = self.random.randint(kinds[number].min_steps, kinds[number].max_steps)
        chunk = Chunk(
            number, self.random.randint(0, stream.feed.length - steps), steps, stream.sent
        )
        stream.sent += steps
        if stream.sent >= self.scenario.stream_events:
            stream.is_closed = True
        return chunk


class Sender:
    """One user of a load."""

    def __init__(self, load: Load):
        self._load = load
        self._streams = load.shared if load.scenario.appends else deque[LoadStream]()

    def send_chunk(self, post: Post) -> None:
        """Send one chunk of the next stream, until it is answered or abandoned."""
        stream = self._next_stream()
        self._deliver(stream, self._load.cut(stream), post)

    def _next_stream(self) -> LoadStream:
        streams, load = self._streams, self._load
        while streams and streams[0].is_closed:
            streams.popleft()
        has_room = len(streams) < load.scenario.streams_per_user
        if not streams or (has_room and load.random.random() < NEW_STREAM_SHARE):
            streams.append(load.begin_stream())
        else:
            streams.rotate(-1)
        return streams[-1]

    def _deliver(self, stream: LoadStream, chunk: Chunk, post: Post) -> None:
        load, results = self._load, self._load.results
        path = f"{stream_path(load.model.name, stream.name)}/chunks"
        body = stream.body(chunk)
        retry = Retry(load.retry_s, load.random, clock=load.clock)
        began_s = load.clock()
        while True:
            sent_s = load.clock()
            try:
                reply, timing = post(path, body)
            except Problem as problem:
                results.problems[problem.code] += 1
                delay_s = self._delay_s(stream, chunk, problem, retry)
                if delay_s is None:
                    return
                results.retries += 1
                load.sleep(delay_s)
                continue
            now_s = load.clock()
            fault = stream.accept(load.model, chunk, reply, is_retry=retry.failures > 0)
            if fault is None:
                results.add_answer(chunk, now_s - began_s, now_s - sent_s, timing)
            else:
                results.errors += 1
                results.add_fault(fault)
            return

    def _delay_s(
        self, stream: LoadStream, chunk: Chunk, problem: Problem, retry: Retry
    ) -> float | None:
        """How long to wait before the next attempt; None where the chunk is finished."""
        if problem.code in POSITION_CODES:
            self._accept_position(stream, chunk, problem, is_retry=retry.failures > 0)
            return None
        try:
            if stream.appends and not problem.was_not_applied:
                stream.unknown_appends += 1
                raise problem
            return retry.next_delay_s(problem)
        except Problem:
            stream.is_closed = True
            self._load.results.add_error(problem.code, f"stream {stream.name!r}: {problem.detail}")
            return None

    def _accept_position(
        self, stream: LoadStream, chunk: Chunk, problem: Problem, *, is_retry: bool
    ) -> None:
        results = self._load.results
        may_be_applied = problem.code == "already_applied" and is_retry and not stream.appends
        if may_be_applied and problem.position == stream.position + chunk.steps:
            stream.skip(chunk)
            results.skipped += 1
            return
        results.errors += 1
        where = f"stream {stream.name!r}, chunk at {stream.position}"
        results.add_fault(Fault(problem.code, f"{where}: {problem.detail}"))
        if problem.code != "position_ahead" or stream.appends:
            stream.is_closed = True
            return
        fault = stream.rewind(problem.position or 0, str(problem.document.get("tag") or ""))
        if fault is not None:
            results.add_fault(fault)
