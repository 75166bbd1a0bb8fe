"""Aggregates of an airport's recent departures, fields of the event of each departure.

The service keeps a state per stream, so what all streams of an airport did is part of the event,
and its producer computes it, which sees the departures of all streams in the order of their
moments. The data of training and the departures that `examples/topics` produces are of this class.

Invariant: the fields of a departure depend on departures of strictly earlier moments only, also on
their delays, which are known when they leave. Departures of one moment do not see each other, so
their order among themselves changes nothing.
"""

from __future__ import annotations

from collections import defaultdict, deque

MINUTE_MS = 60_000
WINDOWS_MIN = (15, 60)
"""Lengths of the windows, in minutes."""

AIRPORT_COLUMNS = tuple(
    f"airport_{what}_{minutes}m" for minutes in WINDOWS_MIN for what in ("departures", "delay")
)
"""The fields, in their order: departures, and their mean delay in minutes, of each window."""


class AirportTraffic:
    """The departures of each airport in the last hour.

    A producer that starts in the middle of the day feeds the departures of the hour before first.
    """

    def __init__(self) -> None:
        """Start without any departure."""
        self._airports: defaultdict[str, _Airport] = defaultdict(_Airport)

    def add(self, origin: str, departed_ms: int, dep_delay: int) -> dict[str, int | float | None]:
        """Add a departure and return its fields.

        Args:
            origin: the airport.
            departed_ms: epoch milliseconds, at least those of the airport's departure before.
            dep_delay: minutes.

        Returns:
            `AIRPORT_COLUMNS` of the departures in [departed - window, departed); the mean delay,
            to a tenth, is None if there was none.

        Raises:
            ValueError: the departure is earlier than one that was added.
        """
        return self._airports[origin].add(departed_ms, dep_delay)


class _Airport:
    def __init__(self) -> None:
        self._now_ms = 0
        self._of_now: list[int] = []
        self._windows = [_Window(minutes * MINUTE_MS) for minutes in WINDOWS_MIN]

    def add(self, departed_ms: int, dep_delay: int) -> dict[str, int | float | None]:
        if departed_ms < self._now_ms:
            raise ValueError(f"expected a moment from {self._now_ms} ms on, got {departed_ms}")
        if departed_ms > self._now_ms:
            for window in self._windows:
                window.advance(self._now_ms, self._of_now, departed_ms)
            self._now_ms, self._of_now = departed_ms, []
        self._of_now.append(dep_delay)
        values = [value for window in self._windows for value in (window.count, window.mean)]
        return dict(zip(AIRPORT_COLUMNS, values, strict=True))


class _Window:
    """The departures of the last `length_ms`, their number and the sum of their delays."""

    def __init__(self, length_ms: int) -> None:
        self._length_ms = length_ms
        self._kept: deque[tuple[int, int]] = deque()
        self._total = 0

    def advance(self, moment_ms: int, delays: list[int], now_ms: int) -> None:
        """Add the departures of a moment, and drop those older than the window."""
        self._kept.extend((moment_ms, delay) for delay in delays)
        self._total += sum(delays)
        while self._kept and self._kept[0][0] < now_ms - self._length_ms:
            self._total -= self._kept.popleft()[1]

    @property
    def count(self) -> int:
        return len(self._kept)

    @property
    def mean(self) -> float | None:
        return round(self._total / len(self._kept), 1) if self._kept else None
