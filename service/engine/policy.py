"""Which waiting jobs form the next batch: a pure function of the queue and the limits.

Invariants: at most one job of a stream is in flight; jobs of one stream keep their order;
the oldest job that may run is always taken, so nobody starves, however long it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Set
from dataclasses import dataclass
from typing import Protocol


class Waiting(Protocol):
    """What the policy sees of a job."""

    @property
    def key(self) -> Hashable | None:
        """The stream, or None for a job that continues no stream."""

    @property
    def steps(self) -> int:
        """Steps it needs."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How large a batch may grow.

    Attributes:
        max_rows: jobs per batch.
        max_padded_steps: rows times the longest row's steps; a single longer job goes alone.
        long_steps: a job of more steps is a long one, which takes several runtime calls.
    """

    max_rows: int
    max_padded_steps: int
    long_steps: int = 2**31


def form(
    queue: Iterable[Waiting], busy: Set[Hashable], limits: BatchLimits, *, long_ones: bool = True
) -> list[int]:
    """Indices of the jobs to run next, in queue order; empty where none may run.

    Args:
        queue: waiting jobs, oldest first.
        busy: streams with a job in flight.
        long_ones: whether long jobs may be taken.
    """
    chosen: list[int] = []
    passed: set[Hashable] = set()
    longest = 0
    for index, job in enumerate(queue):
        if len(chosen) == limits.max_rows:
            break
        if job.key is not None:
            if job.key in busy or job.key in passed:
                continue
            passed.add(job.key)
        if job.steps > limits.long_steps and not long_ones:
            continue
        padded = (len(chosen) + 1) * max(longest, job.steps)
        if chosen and padded > limits.max_padded_steps:
            continue
        chosen.append(index)
        longest = max(longest, job.steps)
    return chosen
