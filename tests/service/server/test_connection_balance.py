"""Balancing of new connections: whose turn it is, and real sockets that several acceptors share."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain
from typing import cast
from unittest.mock import Mock

import pytest
from structlog.testing import capture_logs

from service.server.connection_balance import (
    DEFER_S,
    FULL,
    NOT_ACCEPTING,
    Acceptor,
    WorkerLoad,
)
from tests.support.servers import becomes

FILL = 4


def turns(loads: list[int]) -> list[int]:
    """The workers that may accept the next connection."""
    accepting = [index for index, load in enumerate(loads) if load != NOT_ACCEPTING]
    return [index for index in accepting if WorkerLoad(loads, index, FILL).is_next()]


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([0, 0, 0], [0]),
        ([0, 1, 0], [1]),
        ([2, 2, 3], [2]),
        ([3, 4, 1], [0]),
        ([4, 4, 0], [2]),
        ([4, 4, 4], [0, 1, 2]),
        ([7, 4, 5], [1]),
        ([16, 14, 15], [0, 1, 2]),
        ([17, 14, 15], [1, 2]),
        ([NOT_ACCEPTING, 9, NOT_ACCEPTING], [1]),
        ([FULL, 100, NOT_ACCEPTING], [1]),
        ([FULL, FULL + 1, NOT_ACCEPTING], [0, 1]),
    ],
)
def test_fullest_unfilled_worker_is_next_and_then_the_least_loaded(
    loads: list[int], expected: list[int]
) -> None:
    assert turns(loads) == expected


def test_some_worker_is_always_next() -> None:
    choose = random.Random(1)
    for _ in range(2000):
        loads = [choose.choice([NOT_ACCEPTING, 0, choose.randrange(50), FULL]) for _ in range(5)]
        if any(load != NOT_ACCEPTING for load in loads):
            assert turns(loads), loads


class Workers:
    """Acceptors of one socket, each as a worker has it, in one event loop.

    Attributes:
        address: to connect to.
        opened: the connections of each worker.
    """

    def __init__(self, count: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self.loads = [NOT_ACCEPTING] * count
        self.opened: list[list[asyncio.Transport]] = [[] for _ in range(count)]
        self.listeners = [self._listener.dup() for _ in range(count)]
        self.acceptors = [self._acceptor(index) for index in range(count)]
        self._clients: list[socket.socket] = []

    def _acceptor(self, index: int) -> Acceptor:
        opened = self.opened[index]

        class Opened(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                opened.append(cast("asyncio.Transport", transport))

        worker_load = WorkerLoad(self.loads, index, FILL)
        return Acceptor(self.listeners[index], Opened, worker_load, lambda: len(opened))

    async def connect(self, count: int) -> list[int]:
        """Open further connections; returns how many each worker has once all are accepted."""
        for _ in range(count):
            self._clients.append(socket.create_connection(self.address))
        await becomes(lambda: sum(map(len, self.opened)) == len(self._clients), "accepted")
        return [len(opened) for opened in self.opened]

    async def close(self) -> None:
        for acceptor in self.acceptors:
            acceptor.close()
            await acceptor.wait_closed()
        for transport in chain.from_iterable(self.opened):
            transport.abort()
        await asyncio.sleep(0)
        for each in (self._listener, *self.listeners, *self._clients):
            each.close()


@asynccontextmanager
async def sharing(*started: int) -> AsyncIterator[Workers]:
    """Two workers, of which some accept."""
    workers = Workers(2)
    try:
        for index in started:
            workers.acceptors[index].start(100)
        yield workers
    finally:
        await workers.close()


def elapsed_ms(began_s: float) -> int:
    """Milliseconds of the event loop's clock, which counts those; seconds would be rounded."""
    return round(1000 * (asyncio.get_running_loop().time() - began_s))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine changes no worker's turn to accept."""
    monkeypatch.setattr("service.server.connection_balance.DEFER_S", 600.0)


async def test_few_connections_are_accepted_by_one_worker_and_many_by_all(patient: None) -> None:
    async with sharing(0, 1) as workers:
        assert await workers.connect(FILL) == [FILL, 0]
        assert await workers.connect(FILL) == [FILL, FILL]
        assert min(await workers.connect(32 - 2 * FILL)) >= 12


async def test_connection_is_accepted_although_the_next_worker_is_hung() -> None:
    async with sharing(1) as workers:
        # it published its load before
        workers.loads[0] = 0
        began_s = asyncio.get_running_loop().time()
        assert await workers.connect(1) == [0, 1]
        assert elapsed_ms(began_s) >= 1000 * DEFER_S
        assert await workers.connect(2) == [0, 3]


async def test_hung_worker_delays_many_connections_hardly_more_than_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    defer_s = 1.0
    monkeypatch.setattr("service.server.connection_balance.DEFER_S", defer_s)
    async with sharing(1) as workers:
        # the least load of workers that are filled
        workers.loads[0] = FILL
        began_s = asyncio.get_running_loop().time()
        assert await workers.connect(FILL + 40) == [0, FILL + 40]
        # ten seconds, so that a machine that suspends the test adds little
        assert asyncio.get_running_loop().time() - began_s < 40 * defer_s / 4


async def test_worker_that_was_hung_gets_its_connections_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.server.connection_balance.RETRY_S", 0.2)
    async with sharing(1) as workers:
        workers.loads[0] = FILL
        assert await workers.connect(FILL + 10) == [0, FILL + 10]
        await asyncio.sleep(0.3)
        began_s = asyncio.get_running_loop().time()
        assert await workers.connect(1) == [0, FILL + 11]
        assert elapsed_ms(began_s) >= 1000 * DEFER_S


async def test_worker_at_its_limit_leaves_connections_to_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.server.connection_balance.RETRY_S", 600.0)
    async with sharing(0, 1) as workers:
        workers.acceptors[0]._measure_load = lambda: FULL
        assert await workers.connect(FILL + 2) == [0, FILL + 2]


async def test_closed_acceptor_neither_accepts_nor_delays_the_others() -> None:
    async with sharing(0, 1) as workers:
        workers.acceptors[0].close()
        workers.acceptors[0].close()
        assert workers.loads[0] == NOT_ACCEPTING
        assert workers.acceptors[0].publish() == NOT_ACCEPTING == workers.loads[0]
        assert await workers.connect(FILL + 1) == [0, FILL + 1]


async def test_acceptor_that_is_closed_while_it_defers_does_not_accept(patient: None) -> None:
    async with sharing(0) as workers:
        workers.loads[1] = FILL - 1
        measured: list[None] = []
        workers.acceptors[0]._measure_load = lambda: measured.append(None) or 0
        with socket.create_connection(workers.address):
            # again and again while it defers
            await becomes(lambda: len(measured) > 5, "deferring")
            accepting = asyncio.all_tasks() - {asyncio.current_task()}
            workers.acceptors[0].close()
            ended, left = await asyncio.wait(accepting, timeout=60)
            assert not left
            assert all(task.cancelled() for task in ended)
            assert workers.opened[0] == []


async def test_failure_to_accept_is_logged_and_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.server.connection_balance.RETRY_S", DEFER_S)
    async with sharing() as workers:
        acceptor, listener = workers.acceptors[0], workers.listeners[0]
        failing = Mock(wraps=listener)
        failing.fileno = listener.fileno
        failures = iter([OSError(errno.EMFILE, "Too many open files"), ConnectionAbortedError()])

        def accept() -> tuple[socket.socket, object]:
            if (failure := next(failures, None)) is not None:
                raise failure
            return listener.accept()

        failing.accept.side_effect = accept
        acceptor._listener = failing
        acceptor.start(100)
        with capture_logs() as logs:
            assert await workers.connect(1) == [1, 0]
        assert [line["event"] for line in logs] == ["accept_failed"]
        assert await workers.connect(1) == [2, 0]
