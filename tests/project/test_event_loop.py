"""The event loop of async tests."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import warnings

import pytest

from tests.support.event_loop import EventLoop


def test_a_timeout_ends_a_test_that_awaits_forever() -> None:
    """The timeout raises in the handler of a signal."""

    async def wait_forever() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.Event().wait()

    before = signal.signal(signal.SIGUSR1, lambda *_: pytest.fail("too late"))
    try:
        with (
            pytest.raises(pytest.fail.Exception, match="too late"),
            asyncio.Runner(loop_factory=EventLoop) as runner,  # noqa: TID251  # it is uvloop
        ):
            runner.run(wait_forever())
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_stream_that_is_left_open_fails_the_test_that_opened_it_and_no_later_one() -> None:
    local, remote = socket.socketpair()

    async def leave_open() -> None:
        _, writer = await asyncio.open_connection(sock=local)
        cycle: list[object] = [writer]
        cycle.append(cycle)

    with (
        remote,
        pytest.raises(pytest.fail.Exception, match="left open on its event loop"),
        asyncio.Runner(loop_factory=EventLoop) as runner,  # noqa: TID251  # it is uvloop
    ):
        runner.run(leave_open())
    with warnings.catch_warnings(record=True) as later:
        warnings.simplefilter("always")
        gc.collect()
    assert not [str(warning.message) for warning in later]
