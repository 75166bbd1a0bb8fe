"""Waiting events become chunks of consecutive ones, in order within each stream."""

from __future__ import annotations

import msgspec

from service.consumers.events import Event
from service.consumers.waiting import WaitingEvents


def events_of(stream: str, *positions: int | None) -> list[Event]:
    value = msgspec.Raw(b"[1]")
    return [
        Event(b"%d-0" % at, stream, value, position, ()) for at, position in enumerate(positions)
    ]


def chunks(waiting: WaitingEvents, stream: str, most: int = 3) -> list[list[int | None]]:
    found = []
    while events := waiting.take(stream, most):
        found.append([event.position for event in events])
    return found


def waiting_of(*events: Event) -> WaitingEvents:
    waiting = WaitingEvents()
    for event in events:
        waiting.add(event)
    return waiting


def test_chunks_have_consecutive_positions_up_to_a_limit() -> None:
    waiting = waiting_of(*events_of("a", 0, 1, 2, 3, 5, 6, 6, 7, None, None, 8))
    assert chunks(waiting, "a") == [[0, 1, 2], [3], [5, 6], [6, 7], [None, None], [8]]
    assert "a" not in waiting


def test_events_that_are_put_back_come_first_and_alone_if_they_shall() -> None:
    first, second, third, fourth = events_of("a", 0, 1, 2, 3)
    waiting = waiting_of(third, fourth)
    first.is_alone = second.is_alone = True
    waiting.put_back([first, second])
    assert chunks(waiting, "a") == [[0], [1], [2, 3]]


def test_streams_wait_by_themselves() -> None:
    waiting = WaitingEvents()
    first, second = events_of("a", 0, 1)
    assert [waiting.add(first), waiting.add(second)] == [True, False]
    assert waiting.add(*events_of("b", 0))
    assert list(waiting.take_all("a")) == [first, second]
    assert waiting.clear() == 1
    assert waiting.take("b", 3) == []
