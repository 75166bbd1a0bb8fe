"""Clients, workers and store while one action changes them.

A worker is modelled as it is built: a chunk that continues a cached state is computed and its
commit sent at once, any other is loaded first; commands go through one pipelined connection and
are executed in order; a chunk whose commit is sent lets the stream's next one start.
"""

from collections.abc import Callable
from typing import Any

from service.core.delivery import Process, Replay, Resolution
from service.core.errors import CarryError, Conflict, StateChanged
from service.core.values import FIRST_TAG
from service.store.base import Committed, Conflicted
from tests.protocol import histories, invariants
from tests.protocol.model import Model, ScriptCall, stream_key
from tests.protocol.state import (
    NO_HISTORY,
    NOTHING,
    STREAMS,
    Command,
    Entry,
    History,
    Keys,
    Request,
    Route,
    SystemState,
    Version,
    Worker,
)

DELETE_ATTEMPTS = 3
"""A deletion without If-Match expects nothing, then what it read; at its last attempt the epoch is
enough. A fork is tried twice. The service tries both more often."""


class System:
    """A mutable copy of a system state; its methods are what actions consist of."""

    def __init__(self, state: SystemState, model: Model):
        self.model, self.scenario, self.rules = model, model.scenario, model.rules
        self.before, self.older, self.faults = state.store, state.older, state.faults
        self.store = list(state.store)
        self.workers: list[Any] = [
            Worker(*map(list, worker[:3]), route=worker.route) for worker in state.workers
        ]
        self.clients, self.in_transit = list(state.clients), list(map(list, state.in_transit))
        # to clients: versions or error codes, for traces
        self.answers: list[tuple[Request, Version | str]] = []

    def apply(self, action: tuple[Callable[..., None], tuple[int, ...]]) -> SystemState:
        """The state that an action leads to; raises Violation."""
        effect, arguments = action
        effect(self, *arguments)
        store = tuple(self.store)
        if not self.faults.rollbacks:
            self.older = ()
        elif store != self.before and store not in self.older:
            self.older = (*self.older, store)
        workers = tuple(Worker(*map(tuple, worker[:3]), worker.route) for worker in self.workers)
        in_transit = tuple(sorted(map(tuple, self.in_transit)))
        return SystemState(store, self.older, workers, tuple(self.clients), self.faults, in_transit)

    # Workers

    def start_chunks(self, worker: Any, stream: int) -> None:
        """Start waiting chunks of the stream, until one needs the store."""
        while not any(c.stream == stream and c.blocks_stream for c in worker.connection):
            request = next((r for r in worker.queue if r.operation.stream == stream), None)
            if request is None:
                return
            worker.queue.remove(request)
            try:
                self.start_chunk(worker, request, worker.cache[stream])
            except CarryError as error:
                self.fail(request, error)

    def route_of(self, worker: Any) -> Route:
        """Which model answers at a worker."""
        return self.scenario.routes[worker.route]

    def _continues(self, worker: Any, request: Request, cached: Version) -> bool:
        if not cached.stream:
            return False
        is_own = cached.artifact == self.route_of(worker).artifact
        chunk, copy = self.model.chunk(request), cached.stream
        is_usable = is_own or self.rules.continue_any_model
        return is_usable and self.rules.is_continuation(chunk, copy.head, copy.feed)

    def start_chunk(self, worker: Any, request: Request, cached: Version) -> None:
        """Compute a chunk that continues the cached state or starts over in any case, or load."""
        is_first_attempt = not request.attempts
        if is_first_attempt and self.rules.always_starts(self.model.chunk(request)):
            self.compute(worker, request, cached)
            return
        if self._continues(worker, request, cached):
            self.compute(worker, request, cached)
            if self.rules.answer_early:
                self.acknowledge(request, worker.cache[request.operation.stream])
            return
        if cached and self.rules.reject_from_cache:
            self.evaluate(request, cached)
        worker.connection.append(Command("load", request))

    def compute(self, worker: Any, request: Request, base: Version) -> None:
        """Compute a chunk, cache the new version and send its commit."""
        route, operation = self.route_of(worker), request.operation
        new = self.model.advance(request, base, route.artifact)
        worker.cache[operation.stream] = new
        events = operation.events if route.has_history else ()
        start, tag = new.head.position - len(events), base.head.tag if base.head else FIRST_TAG
        is_created = not base.stream or operation.starts_over
        entry = Entry(start, events, tag, is_created) if events else None
        worker.connection.append(Command("commit", request, base, new, entry))

    def evaluate(self, request: Request, stored: Version) -> Process | Replay:
        return self.rules.evaluate_chunk(self.model.chunk(request), stored.stream)

    def receive(self, worker: Any, command: Command) -> None:
        """The store executes a pending command, and the worker continues with the answer."""
        request, stored = command.request, self.store[command.stream]
        if command.kind == "load":
            self.model.record_read(command.stream, stored)
            self.continue_stored(worker, request, stored.state)
        elif command.kind == "load history":
            artifact = self.route_of(worker).artifact
            read = self.model.read_history(command.stream, stored, artifact)
            switched = self.model.switch(read, artifact) if read.record.stream else read.record
            self.continue_stored(worker, request, switched)
        elif command.kind == "reread":
            self.model.record_read(command.stream, stored)
            values = stored.state.stream, stored.reply.reply, command.new.head
            answer = self.rules.resolve_duplicate(self.model.chunk(request), *values)
            self.resolve(worker, command, answer, stored.reply)
        elif command.kind == "read":
            self.receive_source(worker, command)
        elif self.write(command):
            self.acknowledge(request, command.new)
        elif command.kind == "delete":
            self.receive_rejected_deletion(worker, command, stored.state)
        elif command.kind == "shadow":
            self.answers.append((request, "outdated"))
        elif command.kind == "commit":
            self.receive_rejected_commit(worker, command, stored.state)
        else:
            self.receive_rejected_copy(worker, command, stored.state)

    def continue_stored(self, worker: Any, request: Request, stored: Version) -> None:
        """Compute a loaded chunk, read the history for the state of the worker's model, or read
        the reply."""
        if not isinstance(evaluation := self.evaluate(request, stored), Process):
            worker.connection.append(Command("reread", request, stored))
        elif evaluation.base and stored.artifact != self.route_of(worker).artifact:
            worker.connection.append(Command("load history", request))
        else:
            self.compute(worker, request, stored)

    def resolve(self, worker: Any, command: Command, answer: Any, reply: Version) -> None:
        """Answer a chunk with a reply, or let it wait again, before those that were never tried."""
        request = command.request._replace(attempts=command.request.attempts + 1)
        if answer is Resolution.OWN_REPLY:
            self.acknowledge(request, command.new)
        elif answer is Resolution.STORED_REPLY:
            self.acknowledge(request, reply)
        elif request.attempts == self.scenario.attempts:
            raise Conflict("too many version conflicts")
        else:
            worker.queue.insert(sum(1 for other in worker.queue if other.attempts), request)

    def receive_source(self, worker: Any, command: Command) -> None:
        """The state was read for a guarded deletion, a restore, a fork, a rewind or a shadow."""
        request, operation = command.request, command.request.operation
        source = operation.source if operation.kind == "copy" else operation.stream
        stored, artifact = self.store[source], self.route_of(worker).artifact
        self.model.record_read(source, stored)
        base, read = self.store[operation.stream].state, stored.state
        if not read.stream:
            self.answers.append((request, "not_found"))
        elif operation.kind == "delete":
            worker.connection.append(Command("delete", request, read))
        elif operation.kind == "shadow":
            history = self.model.read_history(source, stored, 1 - artifact)
            new = self.model.switch(history, 1 - artifact)
            worker.connection.append(Command("shadow", request, read, new))
        elif operation.kind == "rewind":
            history = self.model.read_history(source, stored, artifact, operation.position)
            new = self.model.rewind(request, history, artifact)
            if new is None:
                self.answers.append((request, "not available"))
            else:
                entries = histories.cut(history.entries, new.head.position)
                command = Command("rewind", request, read, new, history=History(entries=entries))
                worker.connection.append(command)
        else:
            if source != operation.stream and base.stream:
                base = NOTHING  # the service reports this before its commit; here it conflicts
            new = self.model.copy(request, read)
            kept = NO_HISTORY
            if self.route_of(worker).has_history and source == operation.stream:
                kept = History(new.compared)
            elif self.route_of(worker).has_history and histories.is_valid(stored):
                _, entries, snapshots, _ = stored.history
                kept = History(new.compared, entries, snapshots)
            worker.connection.append(Command("copy", request, base, new, history=kept))

    def receive_rejected_commit(self, worker: Any, command: Command, stored: Version) -> None:
        """Re-evaluate a chunk or read its reply, unless an earlier try of the commit wrote it."""
        cached, worker.cache[command.stream] = worker.cache[command.stream], NOTHING
        if self.was_written(command, stored):
            worker.cache[command.stream] = cached
            self.acknowledge(command.request, command.new)
            return
        chunk = self.model.chunk(command.request)
        answer = self.rules.resolve_conflict(chunk, command.new.head, stored.head)
        if answer is Resolution.STORED_REPLY:
            reread = Command("reread", command.request, stored, command.new)
            worker.connection.append(reread)
        else:
            self.resolve(worker, command, answer, NOTHING)

    def receive_rejected_copy(self, worker: Any, command: Command, stored: Version) -> None:
        """A restore or a rewind is bound to what it read; a fork is retried where there is no
        stream."""
        request, operation = command.request, command.request.operation
        if self.was_written(command, stored):
            self.acknowledge(request, command.new)
        elif (
            operation.kind == "rewind"
            or operation.source == operation.stream
            or stored.stream
            or request.attempts
        ):
            raise StateChanged("not the state that was named")
        else:
            request = request._replace(attempts=1)
            new = self.model.copy(request, command.new)
            again = Command("copy", request, stored, new, history=command.history)
            worker.connection.append(again)

    def receive_rejected_deletion(self, worker: Any, command: Command, stored: Version) -> None:
        """Without a guard a deletion is tried again with what is stored."""
        request = command.request._replace(attempts=command.request.attempts + 1)
        if request.operation.guard:
            if not self.was_written(command, stored):
                raise StateChanged("not the state that was named")
            self.acknowledge(request, NOTHING)
        elif request.attempts < DELETE_ATTEMPTS:
            again = Command("delete", request, stored, repeated=command.repeated)
            worker.connection.append(again)
        elif command.repeated:
            raise self.rules.outcome_unknown(STREAMS[command.stream])
        else:
            raise Conflict("too many version conflicts")

    def was_written(self, command: Command, stored: Version) -> bool:
        """Whether an earlier try of a rejected write was executed."""
        if not command.repeated:
            return False
        key, conflict = stream_key(command.stream), Conflicted(stored.head)
        if command.kind == "delete":
            result = self.rules.resolve_retried_deletion(key, command.base.head, conflict)
        else:
            expected = command.base.stored and command.base.stored.head
            new = command.new.stored.head
            result = self.rules.resolve_retried_commit(key, expected, new, conflict)
        if isinstance(result, CarryError):
            raise result
        return isinstance(result, Committed)

    # Store

    def write(self, command: Command) -> bool:
        """Run the script of a command, if it has one; whether it wrote."""
        if not command.writes:
            return False
        stream, new, stored = command.stream, command.new, self.store[command.stream]
        # an acknowledgement keeps the reply that it read
        answered = command.base if command.request.operation.acknowledges else new
        has_reply = self.scenario.replies and answered.reply
        keys = Keys(new, answered if has_reply else NOTHING, command.history)
        call = ScriptCall("commit", stream, stored, command.base, keys, command.entry)
        if command.kind == "delete":
            by_epoch = command.request.attempts >= DELETE_ATTEMPTS - 1
            tombstone = Keys(self.model.tombstone(command.request))
            call = call._replace(script="delete by epoch" if by_epoch else "delete", new=tombstone)
        elif command.kind != "commit":
            call = call._replace(script=command.kind)
        self.store[stream], done = self.model.run_script(call)
        if done:
            invariants.check_write(command, stored.state)
            self.mark(lambda other: outdates(command, other), outdated=True)
        invariants.check_stored_reply(self.store[stream])
        invariants.check_history(self.store[stream])
        if done and command.kind != "shadow":
            # a version state may be out of date when it is written; nothing may follow from it then
            invariants.check_state(new)
        return done

    def mark(self, chosen: Callable[[Command], Any], **changes: Any) -> None:
        """Change the chosen commands among all in flight."""
        for commands in (*(worker.connection for worker in self.workers), *self.in_transit):
            commands[:] = [c._replace(**changes) if chosen(c) else c for c in commands]

    def mark_request(self, request: Request, /, **changes: Any) -> None:
        """Change the commands of a request."""
        self.mark(lambda command: command.request[:2] == request[:2], **changes)

    # Answers to clients

    def acknowledge(self, request: Request, version: Version) -> None:
        """A success: it must be in the surviving history, as it is answered."""
        operation = request.operation
        client, stored = self.clients[operation.client], self.store[operation.stream].state
        self.answers.append((request, version))
        self.mark_request(request, outcome="applied")
        if operation.kind == "chunk":
            invariants.check_acknowledged_chunk(self.scenario, request, version, stored, client)
            self.update_client(operation.client, last=version)
        elif operation.kind == "delete":
            invariants.check_acknowledged_deletion(request, stored, client)
        applied = replace_at(client.applied, operation.index, True)
        self.update_client(operation.client, applied=applied)

    def fail(self, request: Request, error: CarryError) -> None:
        """A failure: what it says must be true."""
        operation = request.operation
        client, stored = self.clients[operation.client], self.store[operation.stream].state
        self.answers.append((request, error.code))
        invariants.check_failure(self.scenario, request, error, stored, client)
        denied = error.code in invariants.NOT_APPLIED
        self.mark_request(request, outcome="not applied" if denied else "unknown")
        if operation.kind == "chunk":
            self.learn(request, error)

    def learn(self, request: Request, error: CarryError) -> None:
        """What a client concludes from a failed chunk."""
        operation, applied = request.operation, self.clients[request.operation.client].applied
        script, changes = self.scenario.clients[operation.client], {}
        if error.code == "position_ahead":
            expected, positions = error.facts["expected"], [o.position for o in script.operations]
            is_before = [position is None or position < expected for position in positions]
            changes = {"applied": tuple(map(bool.__and__, applied, is_before))}
            if operation.guard:
                changes["last"] = NOTHING
        elif error.code in ("state_changed", "epoch_mismatch"):
            changes = {"applied": (False,) * len(applied), "last": NOTHING, "stopped": True}
        elif error.code in ("already_applied", "position_behind"):
            changes = {"stopped": True}
            if script.alone:
                changes = {"applied": replace_at(applied, operation.index, True)}
        self.update_client(operation.client, **changes)

    def update_client(self, client: int, **changes: Any) -> None:
        self.clients[client] = self.clients[client]._replace(**changes)


def outdates(written: Command, other: Command) -> bool:
    """Whether a sent write must not be applied after this one."""
    deletes = written.kind == "delete"
    if not other.writes or written.stream != other.stream or "shadow" in (written.kind, other.kind):
        return False
    if written.kind == "rewind":
        return other.kind in ("commit", "rewind")
    if deletes == (other.kind == "delete"):
        return False
    if deletes or other.outcome in ("not applied", "applied"):
        return True
    old, new = other.base.stored, written.new.head
    return other.outcome == "unknown" and (old is None or old.head.epoch != new.epoch)


def replace_at(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    """The tuple with one value replaced."""
    return (*values[:index], value, *values[index + 1 :])
