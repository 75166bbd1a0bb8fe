"""The actions of the modelled consumers that are possible in a state, and their effects.

A consumer that takes no step is a paused one: its lease may expire, another acquires the topic, and
then it continues. Without faults every entry is committed in the end (`is_done`).
"""

from collections.abc import Callable, Iterator
from typing import Any

from tests.protocol.consumer.scripts import ConsumerModel
from tests.protocol.consumer.state import Command, Consumer, ConsumerState, Entry, Lease
from tests.protocol.consumer.system import ConsumerSystem
from tests.protocol.system import replace_at

Action = tuple[Callable[..., None], tuple[Any, ...]]
"""A function of this module, and its arguments after the system."""


def possible_actions(state: ConsumerState, model: ConsumerModel) -> Iterator[Action]:
    """Everything that may happen next."""
    store, faults, scenario = state.store, state.faults, model.scenario
    lease = store.lease
    if 0 in state.appended:
        yield append, (state.appended.index(0),)
    if scenario.loaded and not state.is_loaded and 0 not in state.appended[: scenario.loaded]:
        yield load_history, ()
    for number, consumer in enumerate(state.consumers):
        if not consumer.fence and (lease.owner == number or not lease.is_held):
            yield acquire, (number,)
        if _may_read(consumer, state, scenario.room):
            yield read, (number,)
        if consumer.connection:
            yield execute, (number,)
        if consumer.fence and _is_renewal_needed(consumer, store.lease):
            yield renew, (number,)
    yield from ((deliver, (place,)) for place in range(len(state.in_transit)))
    if lease.is_held and state.consumers[lease.owner].fence != lease.fence:
        yield expire, ()  # its owner does not renew it
    if state.http.computed:
        yield commit_chunk, ()
    elif state.http.index < len(scenario.chunks):
        yield compute_chunk, ()
    yield from _possible_faults(state, faults)


def _may_read(consumer: Consumer, state: ConsumerState, room: int) -> bool:
    """Whether a consumer reads new entries; without any it would read nothing."""
    is_reading = any(command.kind == "read" for command in consumer.awaited)
    is_ready = consumer.fence and not consumer.is_recovering and not is_reading
    has_new = state.store.delivered < len(state.store.topic)
    return bool(is_ready and has_new and consumer.in_memory < room)


def _is_renewal_needed(consumer: Consumer, lease: Lease) -> bool:
    """Whether a renewal would change anything; it is sent while no commit is in progress."""
    is_committing = any(command.kind == "commit" for command in consumer.awaited)
    is_changed = consumer.fence != lease.fence or consumer.number > lease.number
    return not is_committing and (is_changed or not lease.is_held)


def _possible_faults(state: ConsumerState, faults: Any) -> Iterator[Action]:
    lease = state.store.lease
    if faults.retries:
        appended = [index for index, count in enumerate(state.appended) if count]
        yield from ((append_again, (index,)) for index in appended)
    if (
        faults.leases_expired
        and lease.is_held
        and state.consumers[lease.owner].fence == lease.fence
    ):
        yield expire_early, ()
    for number, consumer in enumerate(state.consumers):
        if faults.releases and consumer.fence and not consumer.connection:
            yield release, (number,)
        if faults.timeouts and consumer.awaited:
            yield time_out, (number,)
        if not consumer.connection:
            if faults.crashes and consumer != Consumer():
                yield crash, (number, 0, 0)
            continue
        # Losing more than the answer to an executed write leaves no further trace.
        commands = enumerate(consumer.connection, 1)
        cuts = [0, *(place for place, command in commands if command.has_effects)]
        breaks = [(number, cut, 0) for cut in cuts]
        if faults.bytes_delayed and len(cuts) > 1:
            breaks.append((number, 0, 1))
        if faults.replies_lost:
            yield from ((lose_connection, arguments) for arguments in breaks)
        if faults.crashes:
            yield from ((crash, arguments) for arguments in breaks)
    if faults.rollbacks:
        older = enumerate(state.older)
        yield from ((roll_back, (place,)) for place, old in older if old != state.store)


def is_done(state: ConsumerState, model: ConsumerModel) -> bool:
    """Whether everything is appended, and acknowledged."""
    store = state.store
    has_all = store.delivered == len(store.topic) and 0 not in state.appended
    return has_all and not store.pending and state.http.index == len(model.scenario.chunks)


def append(system: ConsumerSystem, index: int) -> None:
    """A producer appends its next event."""
    number = system.appended[index]
    entry = Entry(system.scenario.events[index], number)
    system.appended = replace_at(system.appended, index, number + 1)
    system.store = system.store._replace(topic=(*system.store.topic, entry))


def load_history(system: ConsumerSystem) -> None:
    """The state of a history of the first events is loaded into the store."""
    system.load_history()


def append_again(system: ConsumerSystem, index: int) -> None:
    """A producer appends an event again: it does not know that it did."""
    _spend(system, "retries")
    append(system, index)


def acquire(system: ConsumerSystem, number: int) -> None:
    """A consumer acquires the topic, which is free or was its own."""
    system.acquire(number)


def renew(system: ConsumerSystem, number: int) -> None:
    """A consumer renews its lease, or learns that it, or one of its commits, is lost."""
    system.renew(number)


def read(system: ConsumerSystem, number: int) -> None:
    """A consumer asks for new entries."""
    system.send(number, "read")


def execute(system: ConsumerSystem, number: int) -> None:
    """The store executes the first command of a connection, and the consumer gets the answer."""
    command, *connection = system.consumers[number].connection
    system.update(number, connection=tuple(connection))
    system.receive(number, command, system.run(command))


def expire(system: ConsumerSystem) -> None:
    """The lease expires; its fence stays."""
    lease = system.store.lease._replace(is_held=False)
    system.store = system.store._replace(lease=lease)


def expire_early(system: ConsumerSystem) -> None:
    """The lease expires while its owner believes in it: it was paused for too long."""
    _spend(system, "leases_expired")
    expire(system)


def release(system: ConsumerSystem, number: int) -> None:
    """A consumer gives the topic to another; it has no command in progress."""
    _spend(system, "releases")
    system.release(number)


def lose_connection(system: ConsumerSystem, number: int, executed: int, delayed: int) -> None:
    """A connection breaks after some commands were executed, without an answer, and all pending
    ones are repeated. `delayed`: the bytes are still in transit."""
    _spend(system, "replies_lost")
    _break_connection(system, number, executed, delayed)
    _repeat(system, number)


def time_out(system: ConsumerSystem, number: int) -> None:
    """A consumer waits no longer for its commands, which may still be executed."""
    _spend(system, "timeouts")
    consumer = system.consumers[number]
    if not system.rules.retries_under_fence:
        system.lose(number)
        return
    entries = [entry for item in consumer.in_progress for entry in item.entries]
    abandoned = tuple(command._replace(is_abandoned=True) for command in consumer.connection)
    system.update(number, connection=abandoned, waiting=(*entries, *consumer.waiting))
    system.start_chunks(number, [])


def crash(system: ConsumerSystem, number: int, executed: int, delayed: int) -> None:
    """A consumer dies after some of its commands were executed, and starts again under its name."""
    _spend(system, "crashes")
    _break_connection(system, number, executed, delayed)
    system.consumers[number] = Consumer()


def deliver(system: ConsumerSystem, place: int) -> None:
    """The first command in transit of a broken connection arrives."""
    command, *commands = system.in_transit[place]
    if commands:
        system.in_transit[place] = tuple(commands)
    else:
        del system.in_transit[place]
    system.run(command)


def roll_back(system: ConsumerSystem, place: int) -> None:
    """The store returns to earlier contents; commands in progress are repeated."""
    _spend(system, "rollbacks")
    system.store, system.older = system.older[place], system.older[: place + 1]
    system.in_transit = []
    for number in range(len(system.consumers)):
        _repeat(system, number)


def compute_chunk(system: ConsumerSystem) -> None:
    """A consumer of the service computes the next chunk of the HTTP client."""
    system.load_for_http()


def commit_chunk(system: ConsumerSystem) -> None:
    """A consumer of the service commits the chunk of the HTTP client."""
    system.commit_for_http()


FAULTS = frozenset(
    {append_again, expire_early, release, lose_connection, time_out, crash, roll_back}
)
"""Actions that may happen a limited number of times."""


def _spend(system: ConsumerSystem, fault: str) -> None:
    system.faults = system.faults._replace(**{fault: getattr(system.faults, fault) - 1})


def _break_connection(system: ConsumerSystem, number: int, executed: int, delayed: int) -> None:
    connection = system.consumers[number].connection
    for command in connection[:executed]:
        system.run(command)
    if delayed:
        _spend(system, "bytes_delayed")
        late: list[Command] = [command for command in connection if command.has_effects]
        system.in_transit.append(tuple(late))


def _repeat(system: ConsumerSystem, number: int) -> None:
    """Repeat the commands of a consumer that still waits for them."""
    awaited = system.consumers[number].awaited
    repeated = tuple(command._replace(is_repeated=True) for command in awaited)
    system.update(number, connection=repeated)
