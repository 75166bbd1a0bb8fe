"""What must hold in every world: checked whenever the store writes and a client is answered.

By induction over the steps, a stream's state is that of its whole history, which holds no chunk
twice and grows only by what is written; so it is enough to check what a step changes.
"""

from __future__ import annotations

from service.core.errors import CarryError
from tests.protocol.values import Values
from tests.protocol.world import STREAMS, Client, Guard, Job, Outcome, PlanKind, Request, Slot

NOT_APPLIED = frozenset(
    {
        *("position_ahead", "epoch_mismatch", "state_changed"),
        *("stream_exists", "conflict", "store_unavailable"),
    }
)
"""Error codes that say for certain that the request was not applied."""


class Violation(Exception):
    """An invariant of the protocol does not hold; one sentence."""


def check_write(values: Values, request: Request, before: Slot, after: Slot) -> None:
    """A write is not too late; a commit continues an existing stream, once, from its history."""
    job, deletes = request.job, values.plan(request.job).kind == PlanKind.DELETE
    stream, what = STREAMS[values.plan(job).stream], values.show_job(job)
    if request.outdated and not deletes:
        raise Violation(f"{stream} was deleted after {what} was sent, which is written now")
    if request.outdated:
        lost = ", ".join(values.plan_of_uid(uid).name for uid, _ in before.log)
        raise Violation(
            f"{what} was answered, and is executed now on {lost}, which came after the answer"
        )
    if request.outcome == Outcome.NOT_APPLIED:
        client = values.scenario.clients[job.client].name
        raise Violation(
            f"{client} was answered that nothing was applied of {what}, and it is written now"
        )
    if deletes:
        return
    if values.stream(request.base) and not values.stream(before.state):
        raise Violation(f"{stream} did not exist, and a commit that expected it brought it back")
    uids = [uid for uid, _ in after.log]
    if len(set(uids)) != len(uids):
        raise Violation(f"{stream} holds {what} twice")
    history = tuple(digit for uid in uids for digit in values.plan_of_uid(uid).events)
    if values.events(after.state) != history:
        raise Violation(
            f"{stream} is in a state of the events {values.events(after.state)}, "
            f"and its history is {history}"
        )


def check_stored_reply(stream: str, slot: Slot) -> None:
    """The reply that is stored beside a state is that of its commit."""
    if slot.state and slot.reply not in (0, slot.state):
        raise Violation(f"the stored reply of {stream} is another commit's")


def check_acknowledged_chunk(
    values: Values, job: Job, state: int, slot: Slot, client: Client
) -> None:
    """An acknowledged chunk is in the surviving history, the answer is that of its own commit,
    and everything that its client relies on is before it."""
    plan, uid, what = values.plan(job), values.uid(job), values.show_job(job)
    written = [entry for entry in slot.log if entry[0] == uid]
    if not written:
        raise Violation(
            f"{what} is acknowledged, and is not in the history of {STREAMS[plan.stream]}"
        )
    if written != [(uid, state)]:
        raise Violation(
            f"{what} is answered with the reply of another commit, {values.show_state(state)}; "
            f"its own made {values.show_state(written[0][1])}"
        )
    owner = values.scenario.clients[job.client]
    lost = _find_lost_chunk(values, job, client, slot)
    if lost and (owner.alone or plan.guard is Guard.IF_MATCH):
        raise Violation(
            f"{owner.name} is_continuation with {what} and did not learn that {lost} was lost"
        )


def _find_lost_chunk(values: Values, job: Job, client: Client, slot: Slot) -> str | None:
    """An earlier chunk that the client relies on and that the history has lost."""
    uids = {uid for uid, _ in slot.log}
    plans = values.scenario.clients[job.client].plans[: job.plan]
    first = max((i + 1 for i, plan in enumerate(plans) if plan.kind == PlanKind.DELETE), default=0)
    for index in range(first, job.plan):
        uid = values.uid(Job(job.client, index, 0))
        if client.applied[index] and uid not in uids:
            return values.plan_of_uid(uid).name
    return None


def check_acknowledged_deletion(values: Values, job: Job, slot: Slot, client: Client) -> None:
    """An acknowledged deletion deletes the chunks that its client knew to be applied."""
    for uid, _ in slot.log:
        plan = uid // 16 % 16
        if uid // 256 == job.client and plan < job.plan and client.applied[plan]:
            raise Violation(
                f"{values.show_job(job)} is acknowledged, and "
                f"{values.plan_of_uid(uid).name} is still there"
            )


def check_failure(values: Values, job: Job, error: CarryError, slot: Slot, client: Client) -> None:
    """What a failure says is true: the stream's head, and what was not applied."""
    plan, facts, head = values.plan(job), error.facts, values.head(slot.state)
    stream, what = STREAMS[plan.stream], values.show_job(job)
    if "position" in facts:
        stored = (head.epoch.hex(), head.position, head.tag.hex()) if head else (None, 0, None)
        if (facts["epoch"], facts["position"], facts["tag"]) != stored:
            raise Violation(
                f"{error.code} says that {stream} is at {facts['position']}, "
                f"and it is {values.show_state(slot.state)}"
            )
    if error.code in NOT_APPLIED and job.wrote and _is_applied(values, job, slot):
        raise Violation(f"{what} is answered with {error.code}, and it is applied")
    if plan.kind != PlanKind.CHUNK:
        return
    uids = {uid for uid, _ in slot.log}
    applied = values.uid(job) in uids
    if error.code == "already_applied" and not applied:
        raise Violation(f"{what} is answered as applied, and is not in the history")
    owner = values.scenario.clients[job.client]
    if not owner.alone:
        return
    if error.code == "position_behind" and not applied:
        raise Violation(
            f"{owner.name}, alone on {stream}, is answered that it is past {what}, "
            "which it does not hold"
        )
    if error.code == "position_ahead":
        for index, sent in enumerate(owner.plans):
            uid = values.uid(Job(job.client, index, 0))
            is_before = sent.kind == PlanKind.CHUNK and (sent.position or 0) < facts["expected"]
            if client.applied[index] and is_before and uid not in uids:
                raise Violation(
                    f"{owner.name}, alone on {stream}, is answered to go on at "
                    f"{facts['expected']}, and {sent.name} is lost"
                )


def _is_applied(values: Values, job: Job, slot: Slot) -> bool:
    """Whether the history holds what an earlier try of the job wrote."""
    plan = values.plan(job)
    if plan.kind == PlanKind.DELETE:
        return True
    if plan.kind == PlanKind.CHUNK:
        return (values.uid(job), job.wrote) in slot.log
    head, wrote = values.head(slot.state), values.head(job.wrote)
    return head is not None and wrote is not None and head.epoch == wrote.epoch
