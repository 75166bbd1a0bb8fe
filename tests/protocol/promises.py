"""What must hold in every world: checked whenever the store writes and a client is answered.

By induction over the steps, a stream's state is that of its whole history, which holds no chunk
twice and grows by what is written alone; so it is enough to look at what a step changes.
"""

from __future__ import annotations

from service.core.errors import CarryError
from tests.protocol.book import Book
from tests.protocol.words import at, what, who
from tests.protocol.world import (
    STREAMS,
    ChunkPlan,
    Client,
    DeletePlan,
    Guard,
    Job,
    Request,
    Slot,
)

# What says for certain that the request it answers was not applied.
NOT_APPLIED = frozenset(
    {
        "position_ahead",
        "epoch_mismatch",
        "state_changed",
        "stream_exists",
        "conflict",
        "store_unavailable",
    }
)


class Broken(Exception):
    """A promise of the protocol does not hold; one sentence."""


def check_write(book: Book, request: Request, before: Slot, after: Slot) -> None:
    """A deletion or a commit was written: not too late, and the commit into a stream that is
    there, once, from its whole history."""
    job = request.job
    stream = STREAMS[book.plan(job).stream]
    deletes = isinstance(book.plan(job), DeletePlan)
    if request.stale and not deletes:
        raise Broken(f"{stream} was deleted after {what(book, job)} was sent, which is written now")
    if request.stale:
        lost = ", ".join(book.name(uid) for uid, _ in before.log)
        raise Broken(
            f"{what(book, job)} was answered, and is carried out now on {lost}, "
            "which came after the answer"
        )
    if request.orphan == 2:
        raise Broken(
            f"{who(book, job)} was told that nothing was applied of {what(book, job)}, "
            "and it is written now"
        )
    if deletes:
        return
    if book.stream(request.base) and not book.stream(before.state):
        raise Broken(f"{stream} was gone, and a commit that expected it brought it back")
    uids = [uid for uid, _ in after.log]
    if len(set(uids)) != len(uids):
        raise Broken(f"{stream} holds {what(book, job)} twice")
    events = tuple(digit for uid in uids for digit in book.events(uid))
    if book.past(after.state) != events:
        raise Broken(
            f"{stream} is in a state of the events {book.past(after.state)}, "
            f"and its history is {events}"
        )


def check_reply(stream: str, slot: Slot) -> None:
    """The reply that is kept beside a state is that of its commit."""
    if slot.state and slot.reply not in (0, slot.state):
        raise Broken(f"the reply that is kept of {stream} is another commit's")


def check_answer(book: Book, job: Job, state: int, slot: Slot, client: Client) -> None:
    """A chunk is acknowledged: it is in the history that survives, the answer is that of its
    own commit, and all that its client relies on is before it."""
    plan, uid = book.plan(job), book.uid(job)
    written = [entry for entry in slot.log if entry[0] == uid]
    if not written:
        raise Broken(
            f"{what(book, job)} is acknowledged, and is not in the history of "
            f"{STREAMS[plan.stream]}"
        )
    if written != [(uid, state)]:
        raise Broken(
            f"{what(book, job)} is answered with the reply of another commit, "
            f"{at(book, state)}; its own made {at(book, written[0][1])}"
        )
    alone = book.scenario.clients[job.client].alone
    lost = _lost(book, job, client, slot)
    if lost and (alone or plan.guard is Guard.IF_MATCH):
        raise Broken(
            f"{who(book, job)} goes on with {what(book, job)} and was not told that {lost} "
            "is in the history no more"
        )


def check_deletion(book: Book, job: Job, slot: Slot, client: Client) -> None:
    """Check an acknowledged deletion: chunks that its client knew to be applied are deleted."""
    plans = book.scenario.clients[job.client].plans
    for uid, _ in slot.log:
        plan = uid // 16 % 16
        if uid // 256 == job.client and plan < job.plan and client.known[plan]:
            raise Broken(
                f"{what(book, job)} is acknowledged, and {plans[plan].name} is still there"
            )


def _lost(book: Book, job: Job, client: Client, slot: Slot) -> str | None:
    """An earlier chunk that the client relies on and that is in the history no more."""
    uids = {uid for uid, _ in slot.log}
    plans = book.scenario.clients[job.client].plans[: job.plan]
    deleted = [i for i, plan in enumerate(plans) if isinstance(plan, DeletePlan)]
    for plan in range(deleted[-1] + 1 if deleted else 0, job.plan):
        uid = book.uid(job._replace(plan=plan, number=0))
        if client.known[plan] and uid not in uids:
            return book.name(uid)
    return None


def check_failure(book: Book, job: Job, error: CarryError, slot: Slot, client: Client) -> None:
    """What a failure says is so: where the stream stands, and what was not applied."""
    plan, facts, head = book.plan(job), error.facts, book.head(slot.state)
    stream = STREAMS[plan.stream]
    if "position" in facts:
        stands = (head.epoch.hex(), head.position, head.tag.hex()) if head else (None, 0, None)
        if (facts["epoch"], facts["position"], facts["tag"]) != stands:
            raise Broken(
                f"{error.code} says that {stream} stands at {facts['position']}, "
                f"and it is {at(book, slot.state)}"
            )
    if error.code in NOT_APPLIED and job.wrote and _is_there(book, job, slot):
        raise Broken(f"{what(book, job)} is answered with {error.code}, and it is applied")
    if not isinstance(plan, ChunkPlan):
        return
    applied = any(uid == book.uid(job) for uid, _ in slot.log)
    if error.code == "already_applied" and not applied:
        raise Broken(f"{what(book, job)} is told to be applied, and is not in the history")
    alone = book.scenario.clients[job.client].alone
    if error.code == "position_behind" and alone and not applied:
        raise Broken(
            f"{who(book, job)}, alone on {stream}, is told that it is past {what(book, job)}, "
            "which it does not hold"
        )
    if error.code == "position_ahead" and alone:
        uids = {uid for uid, _ in slot.log}
        for index, sent in enumerate(book.scenario.clients[job.client].plans):
            uid = book.uid(Job(job.client, index, 0))
            before = isinstance(sent, ChunkPlan) and (sent.position or 0) < facts["expected"]
            if client.known[index] and before and uid not in uids:
                raise Broken(
                    f"{who(book, job)}, alone on {stream}, is told to go on at "
                    f"{facts['expected']}, and {sent.name} is in the history no more"
                )


def _is_there(book: Book, job: Job, slot: Slot) -> bool:
    """Whether what an earlier try of the job wrote is in the history."""
    plan = book.plan(job)
    if isinstance(plan, DeletePlan):
        return True
    if isinstance(plan, ChunkPlan):
        return (book.uid(job), job.wrote) in slot.log
    head, wrote = book.head(slot.state), book.head(job.wrote)
    return head is not None and wrote is not None and head.epoch == wrote.epoch
