"""Bounds on the bytes of messages that calls receive and hold."""

from __future__ import annotations

import asyncio

import pytest

from service.core.errors import MalformedBody, Overloaded
from service.server.errors import RequestTimeout
from service.transports.v2.grpc import admission
from service.transports.v2.grpc.admission import MessageRoom
from tests.support.servers import becomes

LARGEST = 100


class Calls:
    """Calls that receive their messages when `send` is called, and are answered by `answer`.

    Attributes:
        reading: the calls whose message is being received, in order.
        held: the calls whose message was received.
    """

    def __init__(self, messages: MessageRoom):
        self._messages = messages
        self._sent: dict[int, asyncio.Future[object]] = {}
        self._answers: dict[int, asyncio.Event] = {}
        self.reading: list[int] = []
        self.held: list[int] = []

    def start(self, call: int) -> asyncio.Task[None]:
        return asyncio.create_task(self._run(call))

    def send(self, call: int, message: object) -> None:
        self._sent[call].set_result(message)

    def answer(self, call: int) -> None:
        self._answers[call].set()

    async def _run(self, call: int) -> None:
        async def read() -> object:
            self.reading.append(call)
            self._sent[call] = asyncio.get_running_loop().create_future()
            try:
                return await self._sent[call]
            finally:
                self.reading.remove(call)

        self._answers[call] = asyncio.Event()
        async with self._messages.receive(read) as [message]:
            assert message
            self.held.append(call)
            await self._answers[call].wait()
            self.held.remove(call)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> MessageRoom:
    """Room for three of the largest messages, whose calls may be as slow as a busy machine."""
    monkeypatch.setattr(admission, "WAIT_S", 600.0)
    return MessageRoom(3 * LARGEST, LARGEST, timeout_s=60.0, slow_s=600.0)


@pytest.fixture
async def calls(messages: MessageRoom) -> Calls:
    return Calls(messages)


async def test_no_more_messages_are_received_than_there_is_room_for(calls: Calls) -> None:
    """A received message counts as its length until its call is answered."""
    tasks = [calls.start(call) for call in range(6)]
    await becomes(lambda: calls.reading == [0, 1, 2], "three calls that receive")
    calls.send(0, b"x" * LARGEST)
    calls.send(1, b"x")
    await becomes(lambda: calls.held == [0, 1], "two messages")
    for _ in range(10):
        await asyncio.sleep(0)
    assert calls.reading == [2]
    calls.answer(1)
    await becomes(lambda: calls.reading == [2, 3], "the next call")
    calls.answer(0)
    await becomes(lambda: calls.reading == [2, 3, 4], "the call after it")
    for task in tasks[2:5]:
        task.cancel()
    await becomes(lambda: calls.reading == [5], "the last call, in the room of cancelled ones")
    calls.send(5, b"x")
    await becomes(lambda: calls.held == [5], "its message")
    calls.answer(5)
    await tasks[5]


async def test_call_that_receives_slowly_is_ended_if_others_need_its_room() -> None:
    calls = Calls(MessageRoom(3 * LARGEST, LARGEST, timeout_s=60.0))
    tasks = [calls.start(call) for call in range(4)]
    with pytest.raises(Overloaded, match="arrived slowly"):
        await tasks[0]
    await becomes(lambda: calls.reading == [1, 2, 3], "the waiting call in its place")
    for task in tasks:
        task.cancel()


async def test_call_without_room_ends_a_slow_call_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "SLOW_S", 600.0)
    calls = Calls(MessageRoom(3 * LARGEST, LARGEST, timeout_s=60.0, slow_s=0.0))
    tasks = [calls.start(call) for call in range(3)]
    await becomes(lambda: calls.reading == [0, 1, 2], "three calls that receive")
    tasks.append(calls.start(3))
    await becomes(lambda: calls.reading == [1, 2, 3], "the waiting call in its place")
    for task in tasks:
        task.cancel()


async def test_call_is_rejected_if_the_room_is_taken_by_messages_that_are_held(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "WAIT_S", 0.02)
    held = [calls.start(call) for call in range(3)]
    await becomes(lambda: calls.reading == [0, 1, 2], "three calls that receive")
    for call in range(3):
        calls.send(call, b"x" * LARGEST)
    with pytest.raises(Overloaded, match="300 bytes of messages are buffered, of at most"):
        await calls.start(3)
    for call in range(3):
        calls.answer(call)
    await asyncio.gather(*held)
    last = calls.start(4)
    await becomes(lambda: calls.reading == [4], "a call after them")
    last.cancel()


@pytest.mark.parametrize("turns", range(5))
async def test_call_that_is_cancelled_as_it_gets_room_gives_it_back(turns: int) -> None:
    messages = MessageRoom(LARGEST, LARGEST, timeout_s=60.0)
    calls = Calls(messages)
    messages.count(0, LARGEST)
    waiting = calls.start(0)
    for _ in range(10):
        await asyncio.sleep(0)
    messages.count(LARGEST, 0)
    for _ in range(turns):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    last = calls.start(1)
    await becomes(lambda: calls.reading == [1], "another call in its place")
    last.cancel()


async def test_stream_waits_while_messages_take_all_room(messages: MessageRoom) -> None:
    await messages.wait_for_room()
    messages.count(0, 2 * LARGEST + 1)
    waiting = asyncio.create_task(messages.wait_for_room())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    messages.count(2 * LARGEST + 1, 2 * LARGEST)
    await waiting


async def test_message_that_does_not_come_is_an_error() -> None:
    calls = Calls(MessageRoom(LARGEST, LARGEST, timeout_s=0.02))
    with pytest.raises(RequestTimeout):
        await calls.start(0)


async def test_call_that_times_out_may_be_ended_in_the_same_turn() -> None:
    messages, reading = MessageRoom(LARGEST, LARGEST, 0.02, 0.0), asyncio.Event()
    future = asyncio.get_running_loop().create_future()

    async def read() -> object:
        reading.set()
        return await future

    async def receive() -> None:
        async with messages.receive(read):
            pass

    first = asyncio.create_task(receive())
    await reading.wait()
    # the timeout cancels it before the call resumes
    for _ in iter(future.cancelled, True):
        await asyncio.sleep(0)
    other = receive()
    other.send(None)
    other.close()
    with pytest.raises(Overloaded):
        await first


async def test_call_without_a_message_is_an_error(calls: Calls) -> None:
    last = calls.start(1)
    await becomes(lambda: calls.reading == [1], "a call that receives")
    calls.send(1, None)
    with pytest.raises(MalformedBody, match="expected one, got none"):
        await last
