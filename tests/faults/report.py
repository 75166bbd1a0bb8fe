"""What a run saw, as text, and why it failed, where it did."""

from __future__ import annotations

from collections.abc import Iterator

from tests.faults.plan import KINDS, Kind
from tests.faults.run import Outcome
from tests.faults.sight import STAGES
from tests.faults.verdict import DOUBLED, LOST, MIXED

_SHOWN = 12
_ROLLS_BACK = {"valkey": Kind.ROLLBACK, "redis": Kind.ROLLBACK, "cluster": Kind.LOSSY_FAILOVER}


def report(outcome: Outcome) -> str:
    """The counts of a run."""
    return "\n".join(_lines(outcome))


def failures(outcome: Outcome, *, whole: bool) -> list[str]:
    """Why a run is red; empty where it is not.

    Args:
        whole: whether everything that can occur on the store had to be seen.
    """
    found = [f"{each.kind}: {each.stream}: {each.what}" for each in outcome.verdict.findings]
    found += [f"unexpected: {each}" for each in outcome.history.unexpected]
    found += [f"stuck: {each}" for each in outcome.stuck]
    if whole:
        found += [f"never seen: {name}" for name, count in _wanted(outcome) if not count]
        found += [
            f"kills at the stage {stage!r}: {outcome.kills[stage]}, expected at least "
            f"{outcome.course.kills_per_stage}"
            for stage in STAGES
            if outcome.kills[stage] < outcome.course.kills_per_stage
        ]
        total = sum(outcome.faults.values())
        if total < outcome.course.faults:
            found.append(f"{total} faults, expected at least {outcome.course.faults}")
    return found


def _wanted(outcome: Outcome) -> Iterator[tuple[str, int]]:
    """What must have been seen on this store."""
    seen = outcome.history.seen
    yield from ((kind, outcome.faults[kind]) for kind in KINDS[outcome.course.store])
    yield "conflicts", outcome.conflicts
    if not outcome.course.strict:
        # what the stopped replica does not have is not acknowledged there
        yield "rollbacks with warm caches", outcome.warm_rollbacks
        for name in ("moved on differently", "noticed by a tag that does not follow"):
            yield name, seen[name]
    for name in (
        "replays",
        "resends",
        "refused position_ahead",
        "refused state_changed",
        "refused epoch_mismatch",
        "blind retries",
        "failed deadline_exceeded",
        "failed outcome_unknown",
        "deleted",
        "expired",
        "appends",
    ):
        yield name, seen[name]


def _lines(outcome: Outcome) -> Iterator[str]:
    course, verdict = outcome.course, outcome.verdict
    yield (
        f"{course.store}: seed {course.seed}, {sum(outcome.faults.values())} faults "
        f"({outcome.in_flight} with chunks in flight) over {outcome.events} events in "
        f"{outcome.seconds:.0f} s"
    )
    yield (
        f"  {LOST} {verdict.count(LOST)}, {DOUBLED} {verdict.count(DOUBLED)}, "
        f"{MIXED} {verdict.count(MIXED)}"
    )
    yield (
        f"  checked {verdict.checked_chunks} replies with {verdict.checked_events} events and "
        f"{verdict.episodes} episodes of appends; {outcome.replayed_undisturbed} chunks again on "
        "an undisturbed service"
    )
    yield (
        f"  of the acknowledged chunks, {verdict.taken} were taken away by a fault and "
        f"{verdict.forgotten} forgotten with their streams, their clients told"
    )
    for kind in KINDS[course.store]:
        yield f"  {outcome.faults[kind]:6d}  {kind}"
    yield f"  {outcome.faults[Kind.WORKER_KILL]:6d}  {Kind.WORKER_KILL}, with chunks"
    for stage in STAGES:
        chunks = outcome.chunks_killed[stage]
        yield f"  {outcome.kills[stage]:6d}    {stage} ({chunks} chunks)"
    yield f"  {outcome.warm_rollbacks:6d}  rollbacks with warm caches"
    yield f"  {outcome.conflicts:6d}  conflicts"
    for name, count in sorted(outcome.history.seen.items()):
        yield f"  {count:6d}  {name}"


def losses(outcome: Outcome) -> str:
    """When acknowledged chunks may have been taken away; to read findings by."""
    began_s = outcome.history.began_s
    return "\n".join(
        f"{loss.what}: from {loss.since_s - began_s:.2f}, struck {loss.struck_s - began_s:.2f}, "
        f"until {loss.until_s - began_s:.2f}, done {loss.done_s - began_s:.2f} s"
        for loss in outcome.history.losses
    )


def shortened(found: list[str]) -> str:
    """The first failures, and how many more there are."""
    more = [f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return "\n".join([*found[:_SHOWN], *more])
