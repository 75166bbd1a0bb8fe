"""What producers append, which faults consumers meet meanwhile, and planted bugs."""

from dataclasses import replace
from typing import Any, NamedTuple

from tests.protocol.consumer.scripts import ConsumerRules
from tests.protocol.consumer.state import (
    HTTP_CLIENT,
    PRODUCERS,
    ConsumerFaults,
    ConsumerScenario,
)
from tests.protocol.state import Operation


def _event(name: str, position: int | None, event: int, **options: Any) -> Operation:
    return Operation("chunk", name, events=(event,), position=position, **options)


def _scenario(
    name: str,
    *events: Operation,
    chunks: tuple[Operation, ...] = (),
    loaded: int = 0,
    **faults: int,
) -> ConsumerScenario:
    """A scenario whose operations know their client and place."""

    def number(operations: tuple[Operation, ...], client: int) -> tuple[Operation, ...]:
        numbered = enumerate(operations)
        return tuple(replace(each, client=client, index=index) for index, each in numbered)

    appended, sent = number(events, PRODUCERS), number(chunks, HTTP_CLIENT)
    return ConsumerScenario(name, appended, ConsumerFaults(**faults), sent, loaded=loaded)


A0, A1, A2 = _event("a0", 0, 1), _event("a1", 1, 2), _event("a2", 2, 3)
# Without a position.
B0, B1, B2 = _event("b0", None, 4), _event("b1", None, 5), _event("b2", None, 6)
T0 = _event("t0", None, 7, stream=1)
H0, HTTP_APPEND = _event("h0", 0, 1), _event("an append by HTTP", None, 3)

# fmt: off
CONSUMER_SCENARIOS = (
    PAUSED := _scenario(
        "paused owner: its lease expires, and it continues",
        B0, B1, B2, leases_expired=2),
    RETRIED := _scenario(
        "producers' retries: an event with a position is a duplicate, one without is another event",
        A0, A1, B2, retries=1, leases_expired=1),
    CRASHED := _scenario(
        "crashed owner: bytes of its connection arrive late",
        B0, B1, T0, crashes=1, bytes_delayed=1, leases_expired=1),
    LOST := _scenario(
        "lost replies: commands are repeated, or abandoned",
        B0, B1, T0, replies_lost=1, timeouts=1, bytes_delayed=1),
    RACED := _scenario(
        "raced by HTTP: an HTTP client appends to the same stream",
        B0, B1, chunks=(HTTP_APPEND,), leases_expired=1, timeouts=1),
    ROLLED_BACK := _scenario(
        "rolled back store: commits, deliveries, leases and entries are lost",
        B0, B1, rollbacks=1, leases_expired=1),
    ROLLED_BACK_HTTP := _scenario(
        "rolled back HTTP: the store loses the commit that made an event a duplicate",
        A0, chunks=(H0,), rollbacks=1),
    _scenario(
        "rebalanced topic: it changes hands",
        A0, A1, T0, releases=2, replies_lost=1),
    LOADED := _scenario(
        "loaded history: a state contains the first events, unless a consumer was first",
        B0, B1, B2, loaded=1, leases_expired=1, timeouts=1),
    _scenario(
        "loaded history, rolled back: the load and what was skipped are lost",
        B0, B1, loaded=1, rollbacks=1, leases_expired=1),
)
# fmt: on


class PlantedConsumerBug(NamedTuple):
    """One bug of the rules."""

    name: str
    scenario: ConsumerScenario
    rules: ConsumerRules
    violation: str  # part of the message that says which invariant is violated


# fmt: off
PLANTED_CONSUMER_BUGS = (
    PlantedConsumerBug(
        "entries acknowledged before their commit", CRASHED,
        ConsumerRules(acknowledges_first=True, checks_pending=False), "is acknowledged"),
    PlantedConsumerBug(
        "no fence", PAUSED,
        ConsumerRules(fenced=frozenset()), "not in the order of their entries"),
    PlantedConsumerBug(
        "a read without a fence", PAUSED,
        ConsumerRules(fenced=frozenset({"recover", "commit"})),
        "not in the order of their entries"),
    PlantedConsumerBug(
        "a commit without a fence, of entries that need not be pending", PAUSED,
        ConsumerRules(fenced=frozenset({"recover", "read"}), checks_pending=False),
        "are not those of"),
    PlantedConsumerBug(
        "an owner that does not begin with the pending entries", CRASHED,
        ConsumerRules(recovers=False), "no end can be reached"),
    PlantedConsumerBug(
        "fences from a counter in the store", ROLLED_BACK,
        ConsumerRules(has_unique_fences=False), "not in the order of their entries"),
    PlantedConsumerBug(
        "commits without a number", ROLLED_BACK,
        ConsumerRules(numbers_commits=False), "not in the order of their entries"),
    PlantedConsumerBug(
        "renewals that compare the fence alone", ROLLED_BACK,
        ConsumerRules(renewals_compare=False), "no end can be reached"),
    PlantedConsumerBug(
        "commits of entries that need not be pending", ROLLED_BACK,
        ConsumerRules(checks_pending=False), "the store lost its entry"),
    PlantedConsumerBug(
        "commits that do not compare the state", RACED,
        ConsumerRules(compares_state=False), " replaces "),
    PlantedConsumerBug(
        "a duplicate acknowledged whatever the state is", ROLLED_BACK_HTTP,
        ConsumerRules(compares_for_duplicates=False), "is acknowledged"),
    PlantedConsumerBug(
        "a merged chunk acknowledged as a duplicate as a whole", RETRIED,
        ConsumerRules(splits_duplicates=False), "is acknowledged"),
    PlantedConsumerBug(
        "the answer to a repeated command taken for its effect", LOST,
        ConsumerRules(loses_after_repeats=False), "not in the order of their entries"),
    PlantedConsumerBug(
        "a commit of unknown outcome tried again under the same fence", LOST,
        ConsumerRules(retries_under_fence=True), "not in the order of their entries"),
    PlantedConsumerBug(
        "a source mark that is ignored", LOADED,
        ConsumerRules(skips_loaded=False), "are not those of"),
    PlantedConsumerBug(
        "a chunk that drops the mark before the events that it covers are acknowledged", LOADED,
        ConsumerRules(waits_for_skips=False), "are not those of"),
)
# fmt: on
