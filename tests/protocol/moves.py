"""What may happen next in a world."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from tests.protocol.book import Book
from tests.protocol.world import WRITES, Client, ClientPlan, DeletePlan, Worker, World

Move = tuple[Any, ...]
"""The name of a `Step` method without its underscore, and its arguments."""


def moves(world: World, book: Book) -> Iterator[Move]:
    """Everything that may happen next."""
    for index, client in enumerate(world.clients):
        for plan in _sendable(client, book.scenario.clients[index]):
            for worker in range(_distinct(world.workers)):
                yield "send", index, plan, worker
    left = world.left
    for index, worker in enumerate(world.workers):
        if worker.lane:
            yield "exec", index
            # What is lost beyond a write that was carried out: nothing that leaves a trace.
            cuts = [0] + [i + 1 for i, r in enumerate(worker.lane) if r.kind in WRITES]
            breaks = [(cut, 0) for cut in cuts]
            if left.bytes_held and len(cuts) > 1:
                breaks.append((0, 1))
            if left.replies_lost:
                yield from (("lose", index, cut, held) for cut, held in breaks)
            if left.crashes:
                yield from (("crash", index, cut, held) for cut, held in breaks)
            if left.timeouts and not all(request.orphan for request in worker.lane):
                yield "timeout", index
    yield from (("deliver", place) for place in range(len(world.held)))
    if left.rollbacks:
        yield from (("rollback", i) for i, old in enumerate(world.older) if old != world.store)
    for stream, slot in enumerate(world.store):
        if slot.state and left.streams_expired and not _is_late(world, stream, book):
            yield "expire", stream
        if slot.reply and left.replies_expired:
            yield "expire_reply", stream


def _is_late(world: World, stream: int, book: Book) -> bool:
    """Whether writes are under way for longer than they should be: streams and tombstones live
    longer than that."""
    held = chain.from_iterable(world.held)
    stale = (r for worker in world.workers for r in worker.lane if r.stale)
    return any(book.plan(r.job).stream == stream for r in chain(held, stale))


def _distinct(workers: tuple[Worker, ...]) -> int:
    return 1 if workers[0] == workers[1] else 2


def _sendable(client: Client, plan: ClientPlan) -> Iterator[int]:
    if client.stopped:
        return
    open_ = sum(1 for sent, known in zip(client.sent, client.known, strict=True) if sent > known)
    for index, (sent, known) in enumerate(zip(client.sent, client.known, strict=True)):
        if known:
            continue
        if sent:
            if client.resends and _may_repeat(plan.plans[index]):
                yield index
        elif open_ < plan.window and all(client.sent[:index]):
            yield index


def _may_repeat(plan: Any) -> bool:
    return isinstance(plan, DeletePlan) or getattr(plan, "position", None) is not None
