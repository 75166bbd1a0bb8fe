"""Counters of a replay."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Self

MAX_FAULTS = 100


@dataclass(slots=True)
class Tally:
    """Counts of one replay.

    Attributes:
        events: applied events; those that were sent again after the store lost them count twice.
        chunks: applied chunks.
        retries: attempts that failed with a retryable problem.
        problems: number of them, by code.
        duplicates: chunks sent twice at once.
        replayed: replies marked `replayed`.
        fell_back: how often a stream was behind its acknowledged position.
        lost: by how many events in all.
        skipped: events whose outputs were not received, because their stored reply had expired.
        faults: descriptions of incorrect replies, the first hundred.
        fault_count: number of all incorrect replies.
        latencies_s: of every answered request, with its retries.
        silence_s: the longest time without a reply.
    """

    events: int = 0
    chunks: int = 0
    requests: int = 0
    retries: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    replayed: int = 0
    fell_back: int = 0
    lost: int = 0
    skipped: int = 0
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0
    latencies_s: list[float] = field(default_factory=list)
    silence_s: float = 0.0
    wall_s: float = 0.0

    def retry(self, code: str) -> None:
        """Count a failed attempt that is repeated."""
        self.requests += 1
        self.retries += 1
        self.problems[code] += 1

    def fault(self, text: str | None) -> None:
        """Record a fault, unless it is None."""
        if text is not None:
            self.fault_count += 1
            if len(self.faults) < MAX_FAULTS:
                self.faults.append(text)


class RetryCount(logging.Handler):
    """Counts the retries that the client logs."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def emit(self, record: logging.LogRecord) -> None:
        """Count a record of a retry."""
        code = getattr(record, "code", None)
        if code is not None:
            self._tally.retry(code)

    def __enter__(self) -> Self:
        logger = logging.getLogger("carry_client")
        self._before = logger.level, logger.propagate
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("carry_client")
        logger.level, logger.propagate = self._before
        logger.removeHandler(self)
