"""Async tests run on the event loop that production uses; it closes what they leave open."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest
import uvloop

from tests.support.event_loop import EventLoop

pytestmark = pytest.mark.harness


async def test_event_loop_closes_open_transports_and_names_them() -> None:
    """It neither waits for that, as uvloop does where warnings are errors, nor passes over it."""
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
    failures: list[str] = []

    def leave_open() -> None:
        loop = EventLoop()
        ours, theirs = socket.socketpair()
        loop.run_until_complete(loop.create_connection(asyncio.Protocol, sock=ours))
        with theirs, pytest.raises(pytest.fail.Exception) as caught:
            loop.close()
        failures.append(str(caught.value))

    # in a thread, since a loop that waits forever cannot be interrupted
    thread = threading.Thread(target=leave_open, daemon=True)
    thread.start()
    await asyncio.to_thread(thread.join, 60)
    assert "unclosed resource <UnixTransport" in failures[0]
