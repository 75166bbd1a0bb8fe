"""The order of pipelined chunks on one connection."""

from __future__ import annotations

from service.core.errors import PreviousFailed
from service.transports.common.stream_order import PendingChunk, StreamOrder


class Connection:
    """A connection that records what happens to the chunks, each "stream number".

    Attributes:
        events: chunks that began ("+"), were rejected ("-"), and whose outcome was sent (">").
    """

    def __init__(self, *, overlaps: bool):
        self.events: list[str] = []
        self._names: dict[PendingChunk, str] = {}
        self.order: StreamOrder[PendingChunk] = StreamOrder(
            self._begin, self._reject, self._release, overlaps=overlaps
        )

    def receive(self, name: str, *, appends: bool = True) -> PendingChunk:
        chunk = PendingChunk(name[0])
        chunk.appends = appends
        self._names[chunk] = name
        self.order.add(chunk)
        self.order.set_ready(chunk)
        return chunk

    def answer(self, chunk: PendingChunk, *, failed: bool = False) -> None:
        self.order.record_result(chunk, failed=failed)
        self.order.answer(chunk, "outcome")

    def _begin(self, chunk: PendingChunk) -> None:
        self.events.append("+" + self._names[chunk])

    def _reject(self, chunk: PendingChunk, error: PreviousFailed) -> None:
        self.events.append("-" + self._names[chunk])
        self.answer(chunk, failed=True)

    def _release(self, chunk: PendingChunk) -> None:
        self.events.append(">" + self._names[chunk])


def test_chunks_with_positions_overlap_and_are_answered_in_their_order() -> None:
    connection = Connection(overlaps=True)
    first = connection.receive("a1", appends=False)
    second = connection.receive("a2", appends=False)
    assert connection.events == ["+a1", "+a2"]
    connection.answer(second)
    assert connection.events == ["+a1", "+a2"]
    connection.answer(first)
    assert connection.events[2:] == [">a1", ">a2"]


def test_without_overlap_chunks_with_positions_wait_as_well() -> None:
    connection = Connection(overlaps=False)
    first = connection.receive("a1", appends=False)
    connection.receive("a2", appends=False)
    assert connection.events == ["+a1"]
    connection.answer(first)
    assert connection.events == ["+a1", ">a1", "+a2"]


def test_thousands_of_waiting_chunks_are_rejected_without_recursion() -> None:
    connection = Connection(overlaps=True)
    first = connection.receive("a0")
    names = [f"a{at}" for at in range(1, 4096)]
    for name in names:
        connection.receive(name)
    connection.answer(first, failed=True)
    assert connection.events[2:] == [sign + name for name in names for sign in "->"]


def test_outcome_after_a_disconnect_is_dropped() -> None:
    connection = Connection(overlaps=True)
    first = connection.receive("a1")
    connection.receive("a2")
    connection.order.clear()
    connection.order.answer(first, "outcome")
    assert connection.events == ["+a1"]


def test_success_of_an_append_does_not_clear_a_later_failure() -> None:
    connection = Connection(overlaps=True)
    appended = connection.receive("a1")
    later = connection.receive("a2", appends=False)
    last = connection.receive("a3")
    connection.answer(later, failed=True)
    connection.answer(appended)
    assert connection.events == ["+a1", "+a2", ">a1", ">a2", "-a3", ">a3"]
    assert last.outcome is not None
