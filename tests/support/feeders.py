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


class Feeder(threading.Thread):
    """Sends the same chunk again and again to one stream, on one connection.

    It stops at the first request that fails.

    Args:
        url: of the stream.
        chunk: body of the request without a position.
    """

    def __init__(self, url: str, chunk: dict[str, Any], stopped: threading.Event):
        super().__init__(daemon=True)
        self._url = url
        self._chunk = chunk
        self._stopped = stopped
        self.problems: list[Any] = []
        self.chunks = 0

    def run(self) -> None:
        position = 0
        with httpx.Client(timeout=30) as client:
            while not self._stopped.wait(PACE_S):
                chunk = {**self._chunk, "position": position}
                try:
                    answer = client.post(f"{self._url}/chunks", json=chunk)
                except httpx.HTTPError as error:
                    self.problems.append(error)
                    return
                if answer.status_code != 200:
                    self.problems.append(answer.text)
                    return
                position = answer.json()["position"]
                self.chunks += 1


class Feeders:
    """Several clients at once, each with its own stream."""

    def __init__(self, url: str, model: str, chunk: dict[str, Any], clients: int):
        self._stopped = threading.Event()
        self._feeders = [
            Feeder(f"{url}/v1/models/{model}/streams/fed-{index}", chunk, self._stopped)
            for index in range(clients)
        ]

    @property
    def problems(self) -> list[Any]:
        """Requests that failed."""
        return [problem for feeder in self._feeders for problem in feeder.problems]

    @property
    def chunks(self) -> int:
        """Requests that were answered with 200."""
        return sum(feeder.chunks for feeder in self._feeders)

    def start(self) -> None:
        for feeder in self._feeders:
            feeder.start()

    def stop(self) -> None:
        self._stopped.set()
        for feeder in self._feeders:
            feeder.join()

    def wait_for_more(self) -> None:
        """Until each client has sent ten more chunks, or failed."""
        before = [feeder.chunks for feeder in self._feeders]
        until(
            lambda: all(
                feeder.problems or feeder.chunks > chunks + 10
                for feeder, chunks in zip(self._feeders, before, strict=True)
            ),
            "more chunks",
        )


@contextmanager
def feeding(
    url: str, model: str = "probe", chunk: dict[str, Any] = PROBE, clients: int = CLIENTS
) -> Iterator[Feeders]:
    """Feed a service, and assert that no request failed."""
    feeders = Feeders(url, model, chunk, clients)
    feeders.start()
    try:
        yield feeders
        feeders.wait_for_more()
    finally:
        feeders.stop()
    assert feeders.problems == []
