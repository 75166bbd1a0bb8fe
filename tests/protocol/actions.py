"""The actions that are possible in a system state, and their effects.

If a command is executed but its answer is lost, the command is repeated (`lose_connection`),
abandoned (`time_out`) or its worker dies (`crash`). Bytes in transit on a broken connection are
lost with it, or arrive at any later step (`deliver`).
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from service.core.errors import CarryError, StoreUnavailable
from tests.protocol.model import Model
from tests.protocol.state import NO_HISTORY, NOTHING, STREAMS, Command, Request, SystemState, Worker
from tests.protocol.system import System, replace_at

Action = tuple[Callable[..., None], tuple[Any, ...]]
"""A function of this module, and its arguments after the system."""


def possible_actions(state: SystemState, model: Model) -> Iterator[Action]:
    """Everything that may happen next."""
    workers, faults, routes = state.workers, state.faults, model.scenario.routes
    for client in range(len(state.clients)):
        for index in _sendable_operations(state, model, client):
            yield send, (client, index, 0)
            if workers[0] != workers[1]:
                yield send, (client, index, 1)
    for worker, (_, connection, _, route) in enumerate(workers):
        if route + 1 < len(routes):
            yield notice, (worker,)
        if not connection:
            continue
        yield execute, (worker,)
        # Losing more than the answer to an executed write leaves no further trace.
        cuts = [0, *(place for place, command in enumerate(connection, 1) if command.writes)]
        breaks = [(worker, cut, 0) for cut in cuts]
        if faults.bytes_delayed and len(cuts) > 1:
            breaks.append((worker, 0, 1))
        if faults.replies_lost:
            yield from ((lose_connection, arguments) for arguments in breaks)
        if faults.crashes:
            yield from ((crash, arguments) for arguments in breaks)
        if faults.timeouts and not all(command.outcome for command in connection):
            yield time_out, (worker,)
    yield from ((deliver, (place,)) for place in range(len(state.in_transit)))
    if faults.rollbacks:
        yield from ((roll_back, (i,)) for i, old in enumerate(state.older) if old != state.store)
    for stream, stored in enumerate(state.store):
        # Streams and tombstones live longer than a write is in flight.
        if stored.state and faults.streams_expired and not _has_late_writes(state, stream):
            yield expire, (stream, "state")
        if stored.reply and faults.replies_expired:
            yield expire, (stream, "reply")
        if stored.history.head and faults.histories_expired:
            yield evict, (stream, "entries")
            yield evict, (stream, "states")


def _sendable_operations(state: SystemState, model: Model, number: int) -> Iterator[int]:
    client, script = state.clients[number], model.scenario.clients[number]
    in_flight = sum(map(int.__gt__, client.sent, client.applied))
    for index, operation in enumerate(script.operations):
        if client.applied[index] or client.stopped:
            continue
        if operation.starts_over and operation.guard and not client.last:
            continue  # it cannot name the epoch yet
        if client.sent[index]:
            if client.resends and (operation.kind == "delete" or operation.position is not None):
                yield index
        elif in_flight < script.window and all(client.sent[:index]):
            yield index


def _has_late_writes(state: SystemState, stream: int) -> bool:
    outdated = (c for worker in state.workers for c in worker.connection if c.outdated)
    return any(c.stream == stream for c in chain(outdated, *state.in_transit))


def send(system: System, client: int, index: int, worker: int) -> None:
    """A client sends an operation to a worker."""
    state, operation = system.clients[client], system.scenario.clients[client].operations[index]
    connection, number = system.workers[worker].connection, state.sent[index]
    sent = replace_at(state.sent, index, number + 1)
    system.update_client(client, sent=sent, resends=state.resends - (number > 0))
    if operation.kind == "chunk":
        request = Request(operation, number, state.last if operation.guard else NOTHING)
        system.workers[worker].queue.append(request)
        system.start_chunks(system.workers[worker], operation.stream)
        return
    # The service drops its cached state before it writes; only this worker's.
    if operation.kind != "shadow":
        system.workers[worker].cache[operation.stream] = NOTHING
    reads_first = operation.kind != "delete" or operation.guard
    connection.append(Command("read" if reads_first else "delete", Request(operation, number)))


def notice(system: System, number: int) -> None:
    """A worker notices that another model answers; it takes effect between two batches."""
    worker = system.workers[number]
    system.workers[number] = worker._replace(route=worker.route + 1)


def execute(system: System, number: int) -> None:
    """The store executes the first command of a connection, and the worker gets the answer."""
    worker = system.workers[number]
    command = worker.connection.pop(0)
    if command.outcome:
        system.write(command)
    else:
        try:
            system.receive(worker, command)
        except CarryError as error:
            system.fail(command.request, error)
        system.start_chunks(worker, command.stream)


def lose_connection(system: System, number: int, executed: int, delayed: int) -> None:
    """A connection breaks after some commands were executed, without an answer, and all pending
    ones are repeated. `delayed`: the bytes are still in transit."""
    _spend(system, "replies_lost")
    _break_connection(system, number, executed, delayed)
    _repeat(system, system.workers[number])


def crash(system: System, number: int, executed: int, delayed: int) -> None:
    """A worker dies after some of its commands were executed."""
    _spend(system, "crashes")
    _break_connection(system, number, executed, delayed)
    system.workers[number] = Worker(*map(list, Worker()[:3]), route=system.workers[number].route)


def time_out(system: System, number: int) -> None:
    """The oldest pending command is abandoned; a write may still be executed."""
    _spend(system, "timeouts")
    worker = system.workers[number]
    command = next(command for command in worker.connection if not command.outcome)
    error = system.rules.outcome_unknown(STREAMS[command.stream])
    if not command.writes:
        worker.connection.remove(command)
        error = StoreUnavailable("no answer to a read")
    if command.kind == "commit":
        worker.cache[command.stream] = NOTHING
    system.fail(command.request, error)
    system.start_chunks(worker, command.stream)


def deliver(system: System, place: int) -> None:
    """The first command in transit of a broken connection arrives."""
    commands = system.in_transit[place]
    command = commands.pop(0)
    if not commands:
        system.in_transit.remove(commands)
    _write_unanswered(system, command)


def roll_back(system: System, place: int) -> None:
    """The store returns to earlier contents; all connections break."""
    _spend(system, "rollbacks")
    system.store, system.older = list(system.older[place]), system.older[: place + 1]
    system.in_transit = []
    for worker in system.workers:
        _repeat(system, worker)
    system.mark(lambda command: True, outdated=False)


def expire(system: System, stream: int, key: str) -> None:
    """A stream was idle for too long, or a stored reply is too old."""
    _spend(system, "streams_expired" if key == "state" else "replies_expired")
    system.store[stream] = system.store[stream]._replace(**{key: NOTHING})


def evict(system: System, stream: int, key: str) -> None:
    """The store evicts one of the two keys of a history."""
    _spend(system, "histories_expired")
    keys = system.store[stream]
    history = keys.history._replace(entries=())
    if key == "states":
        history = NO_HISTORY._replace(entries=keys.history.entries)
    system.store[stream] = keys._replace(history=history)


def _spend(system: System, fault: str) -> None:
    system.faults = system.faults._replace(**{fault: getattr(system.faults, fault) - 1})


def _break_connection(system: System, number: int, executed: int, delayed: int) -> None:
    connection = system.workers[number].connection
    for place in range(executed):
        _write_unanswered(system, connection[place])
    if delayed:
        _spend(system, "bytes_delayed")
        system.in_transit.append([command for command in connection if command.writes])


def _write_unanswered(system: System, command: Command) -> None:
    """Run a script whose answer is lost; the command may be repeated."""
    if system.write(command):
        wrote = command.new or system.model.tombstone(command.request)
        system.mark_request(command.request, request=command.request._replace(wrote=wrote))


def _repeat(system: System, worker: Any) -> None:
    """Repeat commands on a new connection: pending ones, and earlier writes to the same streams,
    which could otherwise arrive late and make a pending one succeed."""
    awaited: set[int] = set()
    repeated: list[Command] = []
    for command in reversed(worker.connection):
        is_needed = command.stream in awaited and not system.rules.forget_abandoned
        if not command.outcome or is_needed:
            repeated.insert(0, command._replace(repeated=True))
            if command.writes:
                awaited.add(command.stream)
    worker.connection[:] = repeated
