"""The user class of each scenario, and the shape that runs one scenario after another.

In Locust's statistics an `attempt` is one request, a `chunk` is one delivery with its retries and
the waits between them. A `stage` is a part of the last attempt, from the Server-Timing header of
its reply; `rest` is what remains of it: HTTP on both sides, the network and the generator itself.
"""

import re
import time
from typing import Any, ClassVar

import gevent
from locust import FastHttpUser, LoadTestShape, constant, constant_throughput, task

from carry_client import NoAnswer, Problem, read_response
from tests.load.streams import DEFAULTS, Limits, Streams

SPAWNED_PER_S = 100
ASKED_EVERY_S = 1.0
"""How often Locust asks for the number of users."""
RARELY_RETRIED: Limits = {**DEFAULTS, "max_retry_share": 0.001}
SERVER_STAGES = ("queue", "load", "infer", "commit")
HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "Accept-Encoding": "identity",
}


def read_server_timing_ms(header: str | None) -> dict[str, float]:
    """The service's stages in a Server-Timing header, in milliseconds; empty unless it has all."""
    times_ms = dict(re.findall(r"(\w+);dur=([\d.]+)", header or ""))
    is_complete = times_ms.keys() >= set(SERVER_STAGES)
    return {name: float(times_ms[name]) for name in SERVER_STAGES if is_complete}


class ScenarioUser(FastHttpUser):
    """Sends the next chunk once the last is answered."""

    abstract = True
    connection_timeout = network_timeout = 30.0
    wait_time = constant(0)
    # (users, share of the duration), one after another
    stages: ClassVar[list[tuple[int, float]]] = [(16, 1.0)]
    pace: ClassVar[float] = 0.0  # chunks a second of each user; 0: as fast as they are answered
    # shortest and longest chunk of each kind; thresholds are for the first
    kinds: ClassVar[dict[str, tuple[int, int]]] = {"short": (1, 32)}
    stream_count: ClassVar[int]  # streams that take turns, shared out evenly among the users
    stream_events: ClassVar[int] = 2048  # of each stream
    appends: ClassVar[bool] = False
    limits: ClassVar[Limits]
    streams: ClassVar[Streams]
    chunks: ClassVar[int] = 0

    @classmethod
    def scenario(cls) -> str:
        """Its name on the command line."""
        return cls.__name__.lower()

    @classmethod
    def most_users(cls) -> int:
        """How many users there are at its height."""
        return max(users for users, _ in cls.stages)

    @classmethod
    def users_at(cls, share: float) -> int:
        """How many users there are after a share of the duration."""
        for users, length in cls.stages:
            share -= length
            if share < 0:
                return users
        return cls.stages[-1][0]

    def on_start(self) -> None:
        """Begin with streams of its own, at a random moment of its pace."""
        self.turns = self.streams.new_turns()
        if self.pace:
            gevent.sleep(self.streams.random.uniform(0, 1 / self.pace))
            # starts the pace here; otherwise the second chunk follows the first at once
            self.wait_time()

    def on_stop(self) -> None:
        """Close the connection, which Locust leaves open."""
        self.client.client.close()

    @task
    def send_chunk(self) -> None:
        """Send the next chunk, until it is applied or abandoned."""
        kind, scenario, stats = self.next_kind(), self.scenario(), self.environment.stats
        began_s = time.perf_counter()
        try:
            self.streams.send(self.turns, self.kinds[kind], self._post, sleep=gevent.sleep)
        except Problem as failure:
            stats.log_error("chunk", f"{scenario} {kind}", failure.code)
        else:
            for stage, stage_ms in self.stages_ms.items():
                stats.get(f"{scenario} {stage}", "stage").log(stage_ms, 0)
        chunk_ms = (time.perf_counter() - began_s) * 1000
        stats.get(f"{scenario} {kind}", "chunk").log(chunk_ms, 0)

    def next_kind(self) -> str:
        """The kind of the next chunk."""
        return "short"

    def _post(self, path: str, body: bytes) -> Any:
        sent_s, post = time.perf_counter(), self.client.post
        with post(path, body, headers=HEADERS, catch_response=True, name=self.scenario()) as reply:
            attempt_ms = (time.perf_counter() - sent_s) * 1000
            headers = reply.headers or {}
            try:
                if not reply.status_code:
                    raise NoAnswer(reply.error)
                media = headers.get("content-type", "")
                document = read_response(reply.status_code, media, reply.content or b"")
            except Problem as problem:
                reply.failure(problem.code)
                raise
        self.stages_ms = read_server_timing_ms(headers.get("server-timing"))
        if self.stages_ms:
            self.stages_ms["rest"] = attempt_ms - sum(self.stages_ms.values())
        return document


class Steady(ScenarioUser):
    """An even pace, each stream in turn."""

    pace, wait_time = 4.0, constant_throughput(4.0)
    stream_count = 160
    limits: ClassVar = {**RARELY_RETRIED, "min_rate_share": 0.9}


class Ramp(ScenarioUser):
    """More and more users, each as fast as it is answered."""

    stages: ClassVar = [(users, 0.2) for users in (5, 12, 24, 36, 48)]
    stream_count = 480
    limits: ClassVar = {**DEFAULTS, "min_chunks_per_s": 100.0}


class Burst(ScenarioUser):
    """Few users at an even pace, and three times suddenly ten times as many."""

    stages: ClassVar = [*[(6, 0.2), (60, 0.1)] * 3, (6, 0.1)]
    pace, wait_time = 2.0, constant_throughput(2.0)
    stream_count = 240
    limits: ClassVar = {**DEFAULTS, "min_rate_share": 0.8}


class Hot(ScenarioUser):
    """All users append to the same streams at once."""

    stream_count, stream_events, appends = 4, 8192, True
    limits: ClassVar = {**DEFAULTS, "min_chunks_per_s": 50.0}


class Cold(ScenarioUser):
    """Many streams, each used rarely."""

    stream_count = 20_000
    kinds: ClassVar = {"short": (1, 8)}
    limits: ClassVar = {**RARELY_RETRIED, "min_chunks_per_s": 100.0, "min_compared_events": 30.0}


class Long(ScenarioUser):
    """Chunks of thousands of events among short ones, whose latency is limited."""

    pace, wait_time = 2.0, constant_throughput(2.0)
    stream_count, stream_events = 160, 16_384
    kinds: ClassVar = {"short": (1, 32), "long": (1000, 8000)}
    limits: ClassVar = {**DEFAULTS, "max_p99_ms": 750.0, "min_rate_share": 0.9}

    def next_kind(self) -> str:
        """Every fiftieth chunk is long, from the second on."""
        Long.chunks += 1
        return "long" if Long.chunks % 50 == 2 else "short"


class InTurn(LoadTestShape):
    """The stages of each scenario, one scenario after another."""

    use_common_options = True
    # scenarios that have not ended, the first of them running
    waiting: ClassVar[list[type[ScenarioUser]]]
    duration_s: ClassVar[float]
    # of the running scenario: how long it has run, and when Locust asked last
    _spent_s: float = 0.0
    _asked_s: float | None = None

    def tick(self) -> tuple[int, float] | tuple[int, float, list[type[ScenarioUser]]] | None:
        """The users of the present stage; Locust asks once a second."""
        now_s, users, scenario = self.get_run_time(), self.get_current_user_count(), self.waiting[0]
        if self._asked_s is None:
            if users > 0:
                # Locust starts users of another class, but stops none for them
                return 0, SPAWNED_PER_S
            self._spent_s, self._asked_s = 0.0, now_s
        # the time in which a busy machine suspends the load does not count
        self._spent_s += min(now_s - self._asked_s, ASKED_EVERY_S)
        self._asked_s = now_s
        share = self._spent_s / self.duration_s
        if share < 1:
            return scenario.users_at(share), SPAWNED_PER_S, [scenario]
        self._asked_s = None
        del self.waiting[0]
        return (0, SPAWNED_PER_S) if self.waiting else None
