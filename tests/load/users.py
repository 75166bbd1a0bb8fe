"""Locust users of a load: each sends the next chunk once the last is answered.

Importing this patches sockets and threads for gevent, so only the load's own process does.
"""

from __future__ import annotations

import logging
import time
from typing import Any, ClassVar

import gevent
from locust import FastHttpUser, constant, constant_throughput, task
from locust.env import Environment
from locust.event import Events

from service.client import Problem, read_response
from tests.load.sender import Load, Sender

REQUEST_TIMEOUT_S = 30.0
SPAWNED_PER_S = 1000
HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "Accept-Encoding": "identity",
}


class ChunkUser(FastHttpUser):
    """Sends chunks as fast as they are answered."""

    abstract = True
    load: ClassVar[Load]
    connection_timeout = network_timeout = REQUEST_TIMEOUT_S
    wait_time = constant(0)

    def on_start(self) -> None:
        """Begin with streams of its own."""
        self.sender = Sender(self.load)

    def on_stop(self) -> None:
        """Close the connection, which Locust leaves open."""
        self.client.client.close()

    @task
    def send_chunk(self) -> None:
        """Send the next chunk."""
        self.sender.send_chunk(self._post)

    def _post(self, path: str, body: bytes) -> tuple[Any, str | None]:
        with self.client.post(
            path, data=body, headers=HEADERS, catch_response=True, name="chunk"
        ) as response:
            if not response.status_code:
                raise Problem(0, "no_answer", repr(response.error), is_retryable=True)
            headers = response.headers
            document = read_response(
                response.status_code, headers.get("content-type", ""), response.content or b""
            )
            return document, headers.get("server-timing")


class PacedUser(ChunkUser):
    """Sends chunks at a constant rate, as long as they are answered in time."""

    abstract = True

    def on_start(self) -> None:
        """Start at a random moment, so that users do not send at the same time."""
        super().on_start()
        pace = self.load.scenario.chunks_per_s_per_user or 1.0
        gevent.sleep(self.load.random.uniform(0, 1 / pace))
        # starts the pace here; otherwise the second chunk follows the first at once
        self.wait_time()


def run_scenario(url: str, load: Load) -> None:
    """Run a scenario to its end, with the answers to its last chunks."""
    logging.getLogger("locust").setLevel(logging.ERROR)
    scenario, results = load.scenario, load.results
    pace = scenario.chunks_per_s_per_user
    members: dict[str, Any] = {"host": url, "load": load, "abstract": False}
    if pace is not None:
        members["wait_time"] = constant_throughput(pace)
    user = type("User", (ChunkUser if pace is None else PacedUser,), members)
    environment = Environment(
        user_classes=[user], events=Events(), stop_timeout=load.retry_s + REQUEST_TIMEOUT_S
    )
    environment.events.user_error.add_listener(
        lambda exception, **_: results.crashes.append(repr(exception))
    )
    runner = environment.create_local_runner()
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    try:
        # not by a LoadTestShape, which looks once a second: the stages of a short run are shorter
        for stage in scenario.stages:
            runner.start(scenario.users_in(stage), spawn_rate=SPAWNED_PER_S)
            gevent.sleep(stage.duration_share * scenario.duration_s)
        runner.stop()
    finally:
        runner.quit()
    results.wall_s = time.perf_counter() - began_s
    results.generator_cpu_s = time.process_time() - began_cpu_s
    results.streams = len(load.streams)
