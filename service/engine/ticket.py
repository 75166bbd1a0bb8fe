"""Ticket: the results of several jobs, for a caller that awaits them together."""

from __future__ import annotations

import asyncio
from typing import Any, Generic

from service.core.errors import CarryError
from service.engine.fair_queue import Job, P, R


class Ticket(Generic[P, R]):
    """The results of one or more jobs, for a caller that awaits them together.

    Attributes:
        jobs: the admitted ones, until they are resolved or cancelled: each refers to its ticket.
        future: completes with all results, in the order of the specifications.
    """

    __slots__ = ("_left", "_results", "future", "jobs")

    def __init__(self, count: int):
        self.jobs: list[Job[P, R]] = []
        self.future: asyncio.Future[list[R | CarryError]]
        self.future = asyncio.get_running_loop().create_future()
        self._results: list[Any] = [None] * count
        self._left = count

    def resolve(self, index: int, result: R | CarryError) -> None:
        """Set one result; the last one completes the future, unless it was cancelled."""
        self._results[index] = result
        self._left -= 1
        if not self._left:
            self.jobs.clear()
            if not self.future.done():
                self.future.set_result(self._results)
