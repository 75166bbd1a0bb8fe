"""The event loop of async tests."""

from __future__ import annotations

import asyncio
import os
import signal

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
