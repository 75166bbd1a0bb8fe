"""Bounds on the bytes of messages that calls receive and hold, and on the time they take."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from service.core.errors import CarryError, Overloaded
from service.server.errors import RequestTimeout
from service.transports.v2.grpc.admission import MessageRoom
from tests.support.servers import becomes

LIMIT = 300


class Receiving:
    """A call that receives a message of which some bytes have arrived."""

    def __init__(self, room: MessageRoom, size: int = 0):
        self.connection = SimpleNamespace(loop=asyncio.get_running_loop())
        self.handler = self
        self.error: CarryError | None = None
        self._room = room
        self._size = 0
        room.begin(cast(Any, self))
        self.receive(size)

    def receive(self, size: int) -> None:
        self._size += size
        self._room.count(size)

    def complete(self) -> None:
        self._room.end(cast(Any, self))

    def drop_received(self) -> None:
        self.receive(-self._size)

    def fail(self, error: CarryError) -> None:
        self.error = error


async def test_beyond_the_limit_the_oldest_incomplete_message_is_dropped() -> None:
    room = MessageRoom(LIMIT, 60.0)
    complete = Receiving(room, 100)
    complete.complete()
    calls = [Receiving(room, 100) for _ in range(2)]
    assert [each.error for each in calls] == [None, None]
    calls[1].receive(1)
    assert isinstance(calls[0].error, Overloaded)
    assert [complete.error, calls[1].error] == [None, None]
    assert not room.is_full


async def test_room_that_complete_messages_take_is_full_until_they_are_applied() -> None:
    room = MessageRoom(LIMIT, 60.0)
    room.count(LIMIT)
    assert not room.is_full
    room.count(1)
    assert room.is_full
    assert "301 bytes of messages are buffered, of at most 300" in room.overloaded().detail
    called: list[int] = []

    def take(size: int) -> None:
        called.append(size)
        room.count(size)

    for size in range(3):
        room.notify(partial(take, size))
    room.count(-1)
    assert called == [0, 1]
    room.count(-1)
    assert called == [0, 1, 2]


async def test_any_number_of_calls_that_reject_their_messages_are_notified() -> None:
    """Each gives back its bytes while it is notified."""
    room, called = MessageRoom(LIMIT, 60.0), 0

    def take_and_give_back() -> None:
        nonlocal called
        called += 1
        room.count(1)
        room.count(-1)

    room.count(LIMIT + 1)
    for _ in range(2000):
        room.notify(take_and_give_back)
    room.count(-2)
    assert called == 2000


async def test_message_that_does_not_arrive_in_time_ends_its_call() -> None:
    room = MessageRoom(LIMIT, 0.02)
    late, complete = Receiving(room), Receiving(room)
    complete.complete()
    await becomes(lambda: late.error is not None, "the timeout")
    assert isinstance(late.error, RequestTimeout)
    assert complete.error is None
    later = Receiving(room, 10)
    await becomes(lambda: later.error is not None, "the timeout of a later call")
    room.count(LIMIT)
    assert not room.is_full
