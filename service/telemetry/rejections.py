"""Counters and audit lines of requests that were rejected because of their access key.

Both are bounded, whatever clients send. The first `MAX_KEYS` keys of the store that are rejected
have series of their own. Each combination of key, code and reason has a line at once, and another
one with the number of further rejections at the end of the minute; combinations beyond
`MAX_ENTRIES` in a minute share one. So a process writes at most 2 x (`MAX_ENTRIES` + 1) lines a
minute.
"""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from contextvars import Context
from typing import Final

from prometheus_client import CollectorRegistry, Counter

from service.core.errors import CarryError, Unauthenticated
from service.telemetry.access_log import audit

INTERVAL_S: Final = 60.0
MAX_KEYS: Final = 100
MAX_ENTRIES: Final = 50
UNKNOWN: Final = "unknown"
"""For requests that have not proved to hold a key of this service."""

OTHER: Final = "other"


class KeyRejections:
    """Counts the rejections of access keys of one process. Use from the event loop only."""

    def __init__(self, registry: CollectorRegistry):
        self._counter = Counter(
            "carry_key_rejections",
            "Requests, or items of a request, rejected because of their access key.",
            ("key", "code"),
            registry=registry,
        )
        # an alert on an increase does not see one from no series to 1
        self._counter.labels(UNKNOWN, Unauthenticated.code)
        self._keys: set[str] = set()
        self._tally: Tally[tuple[str, str, str]] = Tally()

    def record(self, error: CarryError) -> None:
        """Record a rejection: a key that is not valid, does not allow the request, or has reached
        a limit."""
        key = error.key_id if error.key_id is not None and error.is_key_proven else UNKNOWN
        if key != UNKNOWN and len(self._keys) < MAX_KEYS:
            self._keys.add(key)
        label = key if key == UNKNOWN or key in self._keys else OTHER
        self._counter.labels(label, error.code).inc()
        entry = key, error.code, str(error.reason)
        if entry not in self._tally and len(self._tally) >= MAX_ENTRIES:
            entry = OTHER, OTHER, OTHER
        if not self._tally:
            # without the request's context, whose id the lines of the minute would have
            loop = asyncio.get_running_loop()
            loop.call_later(INTERVAL_S, self.flush, context=Context())
        self._tally[entry] += 1
        if self._tally[entry] == 1:
            _write(entry, 1)

    def flush(self) -> None:
        """Write the lines of repeated rejections; also call it before the process ends."""
        tally, self._tally = self._tally, Tally()
        for entry, count in tally.items():
            if count > 1:
                _write(entry, count - 1)


def _write(entry: tuple[str, str, str], count: int) -> None:
    key, code, reason = entry
    audit("access_rejected", key=key, code=code, reason=reason, count=count)
