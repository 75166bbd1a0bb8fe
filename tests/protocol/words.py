"""How stories and broken promises speak of clients, chunks and states."""

from __future__ import annotations

from tests.protocol.book import Book
from tests.protocol.world import ChunkPlan, Job


def who(book: Book, job: Job) -> str:
    """The client."""
    return book.scenario.clients[job.client].name


def what(book: Book, job: Job) -> str:
    """What it sent."""
    plan = book.plan(job)
    if not isinstance(plan, ChunkPlan):
        return str(plan.name)
    if plan.position is None:
        return f"{plan.name} (append)"
    return f"{plan.name} (position {plan.position}){' again' if job.number else ''}"


def at(book: Book, state: int) -> str:
    """A state: the events that led to it, position, epoch and the tag's first digits."""
    head = book.head(state)
    if head is None:
        return "a tombstone" if state else "no stream"
    events = "".join(map(str, book.past(state)))
    return f"[{events} @{head.position}, {book.epochs[head.epoch]}, tag {head.tag.hex()[:4]}]"
