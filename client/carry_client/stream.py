"""Stream: sends a stream's events in chunks, each applied once, from any position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from carry_client.http import Carry, stream_path
from carry_client.problem import Problem
from carry_client.retry import Retry


class Stream:
    """A stream of a model, and its position.

    Attributes:
        position: how many events the service has applied, as far as is known.
    """

    def __init__(self, carry: Carry, model: str, name: str, *, retry_s: float = 60.0) -> None:
        """Nothing is requested yet.

        Args:
            retry_s: how long one request is repeated while the service is unavailable.
        """
        self.position = 0
        self._carry = carry
        self._path = stream_path(model, name)
        self._retry_s = retry_s

    def read_position(self) -> int:
        """Ask the service for the position; 0 for a stream that does not exist."""
        try:
            self.position = int(self._request("GET", self._path)["position"])
        except Problem as problem:
            if problem.code != "stream_not_found":
                raise
            self.position = 0
        return self.position

    def send_all(
        self, events: Sequence[Any], chunk_events: int = 64
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Send what the service has not applied yet of the stream's events.

        Yields (position of the chunk, its outputs). A position can repeat: where the store lost
        commits, the stream continues from the position that the service names. The outputs of a
        chunk whose stored reply has expired are skipped.

        Args:
            events: of the whole stream, the first at position 0.

        Raises:
            Problem: not retryable, or the service was unavailable for too long.
        """
        self.read_position()
        while self.position < len(events):
            start = self.position
            chunk = {"position": start, "events": events[start : start + chunk_events]}
            try:
                reply = self._request("POST", f"{self._path}/chunks", chunk)
            except Problem as problem:
                if not problem.has_stream_position:
                    raise
                self.position = problem.position or 0
                continue
            self.position = reply["position"]
            yield start, reply["outputs"]

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        return Retry(self._retry_s).run(lambda: self._carry.request(method, path, body))
