"""Producers, consumers, an HTTP client and the store while one action changes them.

A consumer that owns the topic reads the pending entries first, page by page, then new ones. It has
at most one chunk of a stream in progress; entries that arrive meanwhile are merged into the next
one. Chunks that continue cached states are committed at once and together, others after a load.
Whenever it does not know what a command did, or one is rejected, it forgets its entries and
acquires the topic again, under another fence.
"""

from collections.abc import Sequence
from typing import Any

from service.core.delivery import Process, Replay, evaluate_chunk, is_continuation
from service.core.errors import PositionBehind, StreamRejection
from tests.protocol.consumer import invariants, scripts
from tests.protocol.consumer.scripts import ConsumerModel, TopicEffect
from tests.protocol.consumer.state import Command, Consumer, ConsumerState, Entry, HttpClient, Item
from tests.protocol.invariants import Violation
from tests.protocol.state import NOTHING, Version
from tests.protocol.system import replace_at


class ConsumerSystem:
    """A mutable copy of a system state; its methods are what actions consist of."""

    def __init__(self, state: ConsumerState, model: ConsumerModel):
        self.model, self.scenario, self.rules = model, model.scenario, model.rules
        self.before, self.state = state.store, state
        self.store, self.older, self.faults = state.store, state.older, state.faults
        self.appended, self.http = state.appended, state.http
        self.consumers: list[Consumer] = list(state.consumers)
        self.in_transit, self.is_loaded = list(state.in_transit), state.is_loaded
        self.answers: list[tuple[str, str]] = []  # for traces

    def freeze(self) -> ConsumerState:
        """The system state after an action; raises Violation."""
        if self.store != self.before:
            invariants.check_store(self.store)
            if self.faults.rollbacks and self.store not in self.older:
                self.older = (*self.older, self.store)
        if not self.faults.rollbacks:
            self.older = ()
        return ConsumerState(
            self.store,
            self.older,
            self.appended,
            tuple(self.consumers),
            self.http,
            self.faults,
            tuple(sorted(self.in_transit)),
            self.is_loaded,
        )

    def update(self, number: int, /, **changes: Any) -> Consumer:
        """Change a consumer."""
        self.consumers[number] = self.consumers[number]._replace(**changes)
        return self.consumers[number]

    def send(self, number: int, kind: Any, /, **fields: Any) -> None:
        """Send a command under the consumer's fence."""
        consumer = self.consumers[number]
        command = Command(kind, consumer.fence, **fields)
        self.update(number, connection=(*consumer.connection, command))

    def acquire(self, number: int) -> None:
        """The consumer acquires the topic, and asks for its pending entries."""
        fence = scripts.next_fence(self.store, largest_fence(self.state), self.rules)
        before = self.store
        lease = before.lease._replace(owner=number, fence=fence, number=0, is_held=True)
        self.store = before._replace(lease=lease)
        self.model.record(before, Command("acquire", fence), number, TopicEffect(self.store, True))
        self.update(number, fence=fence, number=0, is_recovering=self.rules.recovers)
        if self.rules.recovers:
            self.send(number, "recover")

    def renew(self, number: int) -> None:
        """The consumer renews its lease, if that is as it knows it."""
        consumer, before = self.consumers[number], self.store
        lease = before.lease
        is_current = consumer.number <= lease.number or not self.rules.renewals_compare
        is_held = consumer.fence == lease.fence and is_current
        if is_held:
            self.store = before._replace(lease=lease._replace(is_held=True))
        else:
            self.lose(number)
        renewal = Command("renew", consumer.fence, consumer.number)
        self.model.record(before, renewal, number, TopicEffect(self.store, is_held))

    def release(self, number: int) -> None:
        """The consumer releases the topic, if its lease is as it knows it."""
        consumer, before = self.consumers[number], self.store
        lease = before.lease
        is_held = consumer.fence == lease.fence and consumer.number <= lease.number
        if is_held:
            self.store = before._replace(lease=lease._replace(is_held=False))
        release = Command("release", consumer.fence, consumer.number)
        self.model.record(before, release, number, TopicEffect(self.store, is_held))
        self.lose(number)

    def lose(self, number: int) -> None:
        """The consumer loses the topic: it forgets its entries, and keeps its cache."""
        self.update(number, fence=0, number=0, is_recovering=False, waiting=())

    # The store's side of a command, and the consumer's

    def run(self, command: Command) -> Any:
        """Execute a command in the store; its answer, None if the scripts reject it."""
        if command.kind == "load":
            return self.store.states[command.items[0].entries[0].stream]
        before = self.store
        answer = self.run_script(command)
        self.model.record(before, command, before.lease.owner, TopicEffect(self.store, answer))
        return answer

    def run_script(self, command: Command) -> Any:
        """Execute the script of a command in the store."""
        if scripts.is_rejected(command, self.store, self.rules):
            return None
        page = self.scenario.page
        if command.kind == "recover":
            return scripts.read_pending(self.store, command.after, page)
        if command.kind == "read":
            self.store, entries = scripts.deliver_new(self.store, page)
            return entries
        if command.kind == "acknowledge":
            self.store = scripts.acknowledge(self.store, command.items[0].entries)
            return "done"
        lease, outcomes = self.store.lease, []
        self.store = self.store._replace(lease=lease._replace(number=command.number))
        for item in command.items:
            stored = self.store.states[item.entries[0].stream]
            self.store, outcome = scripts.commit_item(self.store, item, self.rules)
            invariants.check_item(item, stored, outcome)
            outcomes.append(outcome)
        return outcomes

    def receive(self, number: int, command: Command, answer: Any) -> None:
        """The consumer gets the answer to a command, unless it has abandoned it."""
        consumer = self.consumers[number]
        if not consumer.awaits(command):
            return
        said = ", ".join(map(str, answer)) if isinstance(answer, list | tuple) else str(answer)
        self.answers.append((str(command), "rejected" if answer is None else said or "nothing"))
        is_unknown = command.is_repeated and command.has_effects
        if answer is None or (is_unknown and self.rules.loses_after_repeats):
            self.lose(number)
            return
        if command.kind in ("recover", "read"):
            self.receive_entries(number, command, answer)
        items = []
        if command.kind == "load":
            items = self.evaluate(number, command.items[0].entries, answer)
        if command.kind == "commit" and not self.receive_outcomes(number, command, answer):
            return
        self.start_chunks(number, items)

    def receive_entries(self, number: int, command: Command, entries: Sequence[Entry]) -> None:
        """Entries wait; behind a full page of pending ones there may be more."""
        consumer = self.consumers[number]
        self.update(number, waiting=(*consumer.waiting, *entries))
        if command.kind == "recover" and len(entries) == self.scenario.page:
            self.send(number, "recover", after=entries[-1:])
        elif command.kind == "recover":
            self.update(number, is_recovering=False)

    def receive_outcomes(self, number: int, command: Command, outcomes: Sequence[str]) -> bool:
        """Entries of a conflict come first again; whether the consumer still owns the topic."""
        if "not_pending" in outcomes:
            self.lose(number)
            return False
        for item, outcome in zip(command.items, outcomes, strict=True):
            consumer, stream = self.consumers[number], item.entries[0].stream
            if outcome == "conflict":
                cache = replace_at(consumer.cache, stream, NOTHING)
                self.update(number, cache=cache, waiting=(*item.entries, *consumer.waiting))
            elif item.kind == "chunk":
                self.update(number, cache=replace_at(consumer.cache, stream, item.new))
        return True

    # Chunks

    def start_chunks(self, number: int, items: list[Item]) -> None:
        """Start a chunk of each stream that has none in progress, and commit what is computed."""
        consumer, loads = self.consumers[number], []
        busy = {item.entries[0].stream for item in (*items, *consumer.in_progress)}
        waiting = list(consumer.waiting)
        for stream in sorted({entry.stream for entry in waiting} - busy):
            entries = [entry for entry in waiting if entry.stream == stream]
            merged = scripts.merge(entries, self.scenario.page)
            for entry in merged:
                waiting.remove(entry)
            cached = consumer.cache[stream]
            if cached and self.continues(merged, cached):
                items.append(self.model.advance(merged, cached, consumer.fence))
            else:
                loads.append(Item("chunk", merged))
        self.update(number, waiting=tuple(waiting))
        for load in loads:
            self.send(number, "load", items=(load,))
        if items and self.rules.acknowledges_first:
            for item in items:
                self.send(number, "acknowledge", items=(item,))
        if items:
            self.update(number, number=consumer.number + 1)
            self.send(number, "commit", number=consumer.number + 1, items=tuple(items))

    def continues(self, entries: tuple[Entry, ...], cached: Version) -> bool:
        """Whether the chunk can be computed from the cached state."""
        return is_continuation(self.model.chunk(entries), cached.stream.head, cached.stream.feed)

    def evaluate(self, number: int, entries: tuple[Entry, ...], stored: Version) -> list[Item]:
        """What to commit of a chunk whose stream was loaded; the rest of it waits again."""
        consumer = self.consumers[number]
        if stored.stream and stored.stream.source and self.rules.skips_loaded:
            skipped = tuple(entry for entry in entries if entry.chunk_id in stored.chunks)
            others = entries[len(skipped) :]
            if skipped and (self.rules.waits_for_skips or not others):
                self.update(number, waiting=(*others, *consumer.waiting))
                return [Item("duplicates", skipped, stored)]
            if skipped:
                chunk = self.model.advance(others, stored, consumer.fence)
                return [chunk, Item("duplicates", skipped, stored)]
        try:
            evaluation = evaluate_chunk(self.model.chunk(entries), stored.stream)
        except PositionBehind as error:
            expected, behind = error.facts["expected"], entries
            if self.rules.splits_duplicates:
                behind = tuple(e for e in entries if e.operation.position < expected)
            self.update(number, waiting=(*entries[len(behind) :], *consumer.waiting))
            return [Item("duplicates", behind, stored)]
        except StreamRejection as error:
            raise Violation(f"{entries[0]} is rejected: {error}") from error
        if isinstance(evaluation, Process):
            return [self.model.advance(entries, stored, consumer.fence)]
        assert isinstance(evaluation, Replay)
        return [Item("duplicates", entries, stored)]

    def load_history(self) -> None:
        """The state of a history is written, unless its stream lives."""
        self.is_loaded, new = True, self.model.loaded
        if not self.store.states[0]:
            self.store = scripts.write_state(self.store, 0, new)._replace(loaded=(*new.chunks,))

    # The HTTP client

    def load_for_http(self) -> None:
        """The HTTP client's next chunk is computed, or rejected."""
        operation = self.scenario.chunks[self.http.index]
        entries, stored = (Entry(operation, 0),), self.store.states[operation.stream]
        try:
            evaluate_chunk(self.model.chunk(entries), stored.stream)
        except StreamRejection:
            self.http = HttpClient(self.http.index + 1)
            return
        item = self.model.advance(entries, stored, 0)
        self.http = self.http._replace(computed=item)

    def commit_for_http(self) -> None:
        """The HTTP client's chunk is committed, or has to be evaluated again."""
        item = self.http.computed
        stream = item.entries[0].stream
        self.http = self.http._replace(computed=None)
        if self.store.states[stream].compared == item.base.compared:
            self.store = scripts.write_state(self.store, stream, item.new)
            self.http = HttpClient(self.http.index + 1)


def largest_fence(state: ConsumerState) -> int:
    """The largest fence that occurs anywhere."""
    fences = [store.lease.fence for store in (state.store, *state.older)]
    for consumer in state.consumers:
        fences += [consumer.fence, *(command.fence for command in consumer.connection)]
    fences += [command.fence for commands in state.in_transit for command in commands]
    return max(fences)
