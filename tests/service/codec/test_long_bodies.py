"""Long bodies are decoded one at a time, and other requests run in between."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from itertools import pairwise

import pytest

from service.core.errors import DeadlineExceeded, Overloaded
from service.transports.common import long_bodies
from service.transports.common.long_bodies import AT_ONCE_BYTES, LONG_BYTES, LongBodies

NEVER = float("inf")


async def test_short_body_is_decoded_at_once() -> None:
    bodies = LongBodies(AT_ONCE_BYTES)
    reading = bodies.read(LONG_BYTES - 1, 0.0, lambda: "read")
    with pytest.raises(StopIteration, match="read"):
        reading.send(None)


async def test_other_tasks_run_between_long_bodies() -> None:
    """About as long as a body takes."""
    bodies, order, is_done = LongBodies(AT_ONCE_BYTES), list[str](), asyncio.Event()
    spans: list[tuple[float, float]] = []

    def decode() -> None:
        began_s = time.monotonic()
        time.sleep(0.02)
        order.append("body")
        spans.append((began_s, time.monotonic()))

    async def serve() -> None:
        while not is_done.is_set():
            order.append("other")
            await asyncio.sleep(0)

    other = asyncio.create_task(serve())
    await asyncio.gather(*[bodies.read(LONG_BYTES, NEVER, decode) for _ in range(5)])
    is_done.set()
    await other
    assert len(spans) == 5
    assert ("body", "body") not in pairwise(order)
    assert all(began_s - ended_s > 0.01 for (_, ended_s), (began_s, _) in pairwise(spans))


async def test_longer_bodies_are_decoded_in_a_thread_one_at_a_time() -> None:
    bodies, inside, most = LongBodies(4 * AT_ONCE_BYTES), [0], [0]

    def decode() -> str:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        inside[0] -= 1
        return threading.current_thread().name

    reading = [bodies.read(AT_ONCE_BYTES + 1, NEVER, decode) for _ in range(3)]
    names = await asyncio.gather(*reading)
    assert threading.main_thread().name not in names
    assert most == [1]
    assert await bodies.read(AT_ONCE_BYTES, NEVER, decode) == threading.main_thread().name


@pytest.mark.parametrize("size", [LONG_BYTES, AT_ONCE_BYTES + 1])
async def test_body_whose_deadline_expires_while_it_waits_is_not_decoded(size: int) -> None:
    bodies = LongBodies(4 * AT_ONCE_BYTES)
    with pytest.raises(DeadlineExceeded):
        await bodies.read(size, time.monotonic() - 1, lambda: pytest.fail("decoded"))
    assert await bodies.read(size, NEVER, lambda: 1) == 1


@pytest.mark.parametrize("size", [LONG_BYTES, AT_ONCE_BYTES + 1])
async def test_too_many_waiting_bytes_are_rejected(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_bodies, "MAX_WAITING_BYTES", 0)
    bodies = LongBodies(size)
    reading = [asyncio.create_task(bodies.read(size, NEVER, lambda: 1)) for _ in range(12)]
    done = await asyncio.gather(*reading, return_exceptions=True)
    assert [each for each in done if each == 1]
    assert [type(each) for each in done if each != 1] == [Overloaded] * (len(done) - done.count(1))
    assert done.count(1) < len(done)
    # whoever is cancelled while it waits gives its place back
    waiting = [asyncio.create_task(bodies.read(size, NEVER, lambda: 1)) for _ in range(8)]
    await asyncio.sleep(0)
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert await bodies.read(size, NEVER, lambda: 1) == 1


async def test_no_garbage_is_collected_while_a_body_is_decoded() -> None:
    """A collection traverses a million lists of a hostile body, which are all in use."""
    collections: list[str] = []

    def decode() -> list[list[int]]:
        gc.callbacks.append(note)
        try:
            return [[] for _ in range(100_000)]
        finally:
            gc.callbacks.remove(note)

    def note(phase: str, _: object) -> None:
        collections.append(phase)

    await LongBodies(AT_ONCE_BYTES).read(LONG_BYTES, NEVER, decode)
    assert not collections
    assert gc.isenabled()
