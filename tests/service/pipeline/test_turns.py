"""Turns of the event loop for many waiting tasks."""

from __future__ import annotations

import asyncio

from service.pipeline.turns import AT_ONCE, Turns


async def test_few_tasks_continue_in_one_turn_of_the_event_loop_in_order() -> None:
    loop, turns = asyncio.get_running_loop(), Turns()
    waiting = [loop.create_future() for _ in range(200)]
    for turn in waiting:
        turns.request(turn)
    waiting[3].cancel()
    done = 1
    while not waiting[-1].done():
        await asyncio.sleep(0)
        now_done = sum(turn.done() for turn in waiting)
        assert now_done - done <= AT_ONCE
        # one of the first was cancelled
        assert all(turn.done() for turn in waiting[: now_done - 1])
        done = now_done
    assert all(turn.done() for turn in waiting)


async def test_a_lone_task_continues_at_once() -> None:
    loop, turns = asyncio.get_running_loop(), Turns()
    for _ in range(3):
        turn = loop.create_future()
        turns.request(turn)
        async with asyncio.timeout(60):
            await turn
