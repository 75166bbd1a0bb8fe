"""Report of a run: its counts as text, and the reasons why it failed."""

from __future__ import annotations

from collections.abc import Iterator

from tests.faults.injector import WARM_ROLLBACKS
from tests.faults.plan import KINDS, Kind
from tests.faults.result import DOUBLED, LOST, MIXED
from tests.faults.run import Outcome
from tests.faults.traffic import STAGES

_SHOWN = 12
_EXPECTED = (
    *("conflicts", "replays", "resends", "blind retries", "deleted", "expired", "appends"),
    *("refused position_ahead", "refused state_changed", "refused epoch_mismatch"),
    *("failed deadline_exceeded", "failed outcome_unknown"),
)
_EXPECTED_OF_ROLLBACKS = (
    *(WARM_ROLLBACKS, "advanced by others", "noticed by a tag that does not follow"),
)


def failures(outcome: Outcome, *, whole: bool) -> list[str]:
    """Why a run failed; empty if it passed.

    Args:
        whole: whether everything that can occur on the store must have occurred.
    """
    options, history = outcome.options, outcome.history
    found = [f"{each.kind}: {each.stream}: {each.what}" for each in outcome.result.findings]
    found += [f"unexpected: {each}" for each in history.unexpected]
    found += [f"stuck: {each}" for each in outcome.stuck]
    if not whole:
        return found
    # with `strict`, what the stopped replica does not have was never acknowledged
    expected = _EXPECTED if options.strict else (*_EXPECTED, *_EXPECTED_OF_ROLLBACKS)
    found += [
        f"never occurred: {kind}" for kind in KINDS[options.store] if not history.faults[kind]
    ]
    found += [f"never occurred: {name}" for name in expected if not history.seen[name]]
    found += [
        f"kills at the stage {stage!r}: {history.kills[stage]}, expected at least "
        f"{options.kills_per_stage}"
        for stage in STAGES
        if history.kills[stage] < options.kills_per_stage
    ]
    total = history.faults.total()
    if total < options.faults:
        found.append(f"{total} faults, expected at least {options.faults}")
    return found


def report(outcome: Outcome) -> str:
    """The counts of a run."""
    return "\n".join(_lines(outcome))


def _lines(outcome: Outcome) -> Iterator[str]:
    options, result, history = outcome.options, outcome.result, outcome.history
    yield (
        f"{options.store}: seed {options.seed}, {history.faults.total()} faults over "
        f"{outcome.events} events in {outcome.seconds:.0f} s"
    )
    yield "  " + ", ".join(f"{kind} {result.count(kind)}" for kind in (LOST, DOUBLED, MIXED))
    yield (
        f"  checked {result.checked_chunks} replies with {result.checked_events} events and "
        f"{result.bursts} bursts of appends"
    )
    yield (
        f"  of the acknowledged chunks, {result.rolled_back} were rolled back by a fault and "
        f"{result.removed} removed with their streams; their clients noticed"
    )
    for kind in (*KINDS[options.store], Kind.WORKER_KILL):
        yield f"  {history.faults[kind]:6d}  {kind}"
    for stage in STAGES:
        yield f"  {history.kills[stage]:6d}    {stage} ({history.chunks_killed[stage]} chunks)"
    for name, count in sorted(history.seen.items()):
        yield f"  {count:6d}  {name}"


def describe_failures(outcome: Outcome, found: list[str]) -> str:
    """The first failures, and when acknowledged chunks may have been rolled back."""
    began_s = outcome.history.began_s
    more = [f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    losses = [
        f"{loss.what}: from {loss.since_s - began_s:.2f}, struck {loss.struck_s - began_s:.2f}, "
        f"until {loss.until_s - began_s:.2f}, done {loss.done_s - began_s:.2f} s"
        for loss in outcome.history.losses
    ]
    return "\n".join([*found[:_SHOWN], *more, *losses])
