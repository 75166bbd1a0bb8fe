"""One scenario through Locust: its users, its stages, and what they measured.

Locust is a closed loop: a user sends its next chunk after the last was answered. The pace of a
scenario is an upper bound then; a service that is too slow for it shows as a lower rate.

Importing this patches sockets and threads for gevent, so only the load's own process does.
"""

from __future__ import annotations

import logging
import time
from random import Random

import gevent
from locust import FastHttpUser, constant, constant_throughput, task
from locust.contrib.fasthttp import FastHttpSession
from locust.env import Environment
from locust.event import Events

from tests.load.description import Description
from tests.load.measures import Measures
from tests.load.scenarios import Scenario
from tests.load.sender import Answer, Sender
from tests.load.streams import Population

REQUEST_TIMEOUT_S = 30.0
SPAWNED_PER_S = 1000
HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "Accept-Encoding": "identity",
}


def run_scenario(
    url: str,
    model: Description,
    scenario: Scenario,
    population: Population,
    *,
    seed: int,
    patience_s: float,
) -> Measures:
    """Run a scenario to its end, the answers to the last chunks included."""
    logging.getLogger("locust").setLevel(logging.ERROR)
    measures = Measures([kind.name for kind in scenario.kinds])
    sender = Sender(
        model=model,
        scenario=scenario,
        population=population,
        measures=measures,
        random=Random(seed),
        clock=time.perf_counter,
        sleep=gevent.sleep,
        patience_s=patience_s,
    )
    environment = Environment(
        user_classes=[_user_class(url, scenario, sender)],
        events=Events(),
        stop_timeout=patience_s + REQUEST_TIMEOUT_S,
    )
    environment.events.user_error.add_listener(
        lambda exception, **_: measures.crashes.append(repr(exception))
    )
    runner = environment.create_local_runner()
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    try:
        for stage in scenario.stages:
            runner.start(scenario.users_in(stage), spawn_rate=SPAWNED_PER_S)
            gevent.sleep(stage.duration_share * scenario.duration_s)
        runner.stop()
    finally:
        runner.quit()
    measures.wall_s = time.perf_counter() - began_s
    measures.generator_cpu_s = time.process_time() - began_cpu_s
    measures.streams = population.begun
    return measures


def _user_class(url: str, scenario: Scenario, sender: Sender) -> type[FastHttpUser]:
    pace = scenario.chunks_per_s_per_user

    class ChunkSender(FastHttpUser):
        """One user of a scenario."""

        host = url
        connection_timeout = network_timeout = REQUEST_TIMEOUT_S
        wait_time = constant(0) if pace is None else constant_throughput(pace)

        def on_start(self) -> None:
            """Users who come together do not keep in step."""
            if pace is not None:
                gevent.sleep(sender.random.uniform(0, 1 / pace))
                # begins the pace here; else the second chunk follows the first at once
                self.wait_time()

        def on_stop(self) -> None:
            """Locust leaves a user's connection open."""
            self.client.client.close()

        @task
        def send_chunk(self) -> None:
            """The next chunk of the stream whose turn it is."""
            sender.send(lambda path, body: _post(self.client, path, body))

    return ChunkSender


def _post(client: FastHttpSession, path: str, body: bytes) -> Answer:
    with client.post(path, data=body, headers=HEADERS, catch_response=True, name="chunk") as found:
        if not found.status_code:
            return Answer(0, repr(found.error).encode())
        return Answer(found.status_code, found.content or b"", found.headers.get("server-timing"))
