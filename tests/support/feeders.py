"""Clients that keep a service busy while it restarts: ordinary HTTP clients, without retries."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.support.servers import until

CLIENTS = 4
PROBE = {"inputs": [[0.5] * 3] * 2}
"""A chunk of the model `probe`."""
PACE_S = 0.05
"""Pause between chunks: the tests are about requests during a restart, not about load."""


class Feeders:
    """Several clients at once, each of which sends the same chunk again and again to a stream of
    its own, on one connection, until a request fails.

    Attributes:
        problems: requests that failed.
    """

    def __init__(self, clients: int):
        self.problems: list[Any] = []
        self._sent = [0] * clients

    @property
    def chunks(self) -> int:
        """Requests that were answered with 200."""
        return sum(self._sent)

    def wait_for_more(self) -> None:
        """Until each client has sent ten more chunks, or one has failed."""
        enough = [sent + 10 for sent in self._sent]

        def is_enough() -> bool:
            pairs = zip(self._sent, enough, strict=True)
            return bool(self.problems) or all(sent > least for sent, least in pairs)

        until(is_enough, "more chunks")

    def feed(self, number: int, url: str, chunk: dict[str, Any], stopped: threading.Event) -> None:
        """Send chunks as one of the clients."""
        position = 0
        with httpx.Client(timeout=30) as client:
            while not stopped.wait(PACE_S):
                try:
                    answer = client.post(url, json={**chunk, "position": position})
                except httpx.HTTPError as error:
                    self.problems.append(error)
                    return
                if answer.status_code != 200:
                    self.problems.append(answer.text)
                    return
                position = answer.json()["position"]
                self._sent[number] += 1


@contextmanager
def feeding(
    url: str, model: str = "probe", chunk: dict[str, Any] = PROBE, clients: int = CLIENTS
) -> Iterator[Feeders]:
    """Feed a service, and assert that no request failed."""
    feeders, stopped = Feeders(clients), threading.Event()
    threads = []
    for number in range(clients):
        stream = f"{url}/v1/models/{model}/streams/fed-{number}/chunks"
        arguments = (number, stream, chunk, stopped)
        threads.append(threading.Thread(target=feeders.feed, args=arguments, daemon=True))
        threads[-1].start()
    try:
        yield feeders
        feeders.wait_for_more()
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert feeders.problems == []
