"""Tracks how long the store has not answered, to tell a slow store from a short deadline."""

from __future__ import annotations

import time
from typing import Final

STORE_UNRESPONSIVE_AFTER_S: Final = 0.1
"""A deadline that expires after this much store silence is reported as `store_unavailable`,
otherwise as `deadline_exceeded`."""


class StoreResponsiveness:
    """How long the oldest unanswered request of one model's batches has waited for the store."""

    def __init__(self) -> None:
        self._waiting_since_s: float | None = None

    def note_request(self) -> None:
        """Note that a request is sent to the store."""
        if self._waiting_since_s is None:
            self._waiting_since_s = time.monotonic()

    def note_response(self) -> None:
        """Note that the store answered any request."""
        self._waiting_since_s = None

    def silence_s(self) -> float:
        """Seconds since the store owes an answer; 0 if it owes none."""
        return 0.0 if self._waiting_since_s is None else time.monotonic() - self._waiting_since_s

    def is_unresponsive(self) -> bool:
        """Whether a deadline that expires now is the store's fault."""
        return self.silence_s() > STORE_UNRESPONSIVE_AFTER_S
