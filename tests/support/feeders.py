"""Clients that keep a service busy while it restarts: ordinary HTTP clients, without retries."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.servers import until

CLIENTS = 4
PROBE = {"inputs": [[0.5] * 3] * 2}
"""A chunk of the model `probe`."""
PACE_S = 0.05
"""Pause between chunks: the tests are about requests during a restart, not about load."""


@dataclass
class Feeders:
    """Several clients at once, each of which sends the same chunk again and again to a stream of
    its own, on one connection, until a request fails."""

    sent: list[int]  # chunks of each client that were answered with 200
    feeding: list[Future[None]] = field(default_factory=list)

    @property
    def chunks(self) -> int:
        """Requests that were answered with 200."""
        return sum(self.sent)

    def wait_for_more(self) -> None:
        """Until each client has sent ten more chunks, or one has failed."""
        enough = [sent + 10 for sent in self.sent]

        def is_enough() -> bool:
            is_ended = any(each.done() for each in self.feeding)
            return is_ended or all(map(int.__gt__, self.sent, enough))

        until(is_enough, "more chunks")

    def feed(self, number: int, url: str, chunk: dict[str, Any], stopped: threading.Event) -> None:
        """Send chunks as one of the clients; raises for a request that fails."""
        position = 0
        with httpx.Client(timeout=30) as client:
            while not stopped.wait(PACE_S):
                answer = client.post(url, json={**chunk, "position": position})
                assert answer.status_code == 200, answer.text
                position = answer.json()["position"]
                self.sent[number] += 1


@contextmanager
def feeding(
    url: str, model: str = "probe", chunk: dict[str, Any] = PROBE, clients: int = CLIENTS
) -> Iterator[Feeders]:
    """Feed a service, and assert that no request failed."""
    feeders, stopped = Feeders([0] * clients), threading.Event()
    with ThreadPoolExecutor(clients) as pool:
        for number in range(clients):
            stream = f"{url}/v1/models/{model}/streams/fed-{number}/chunks"
            feeders.feeding.append(pool.submit(feeders.feed, number, stream, chunk, stopped))
        try:
            yield feeders
            feeders.wait_for_more()
        finally:
            stopped.set()
    for each in feeders.feeding:
        each.result()
