"""The moves that are possible in a world, and those of them that are faults.

If a request is executed but its answer is lost, the request is repeated (`lose`), abandoned
(`timeout`) or its worker dies (`crash`). Bytes in transit on a broken connection are lost with it,
or arrive at any later step (`deliver`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from service.core.errors import StoreUnavailable
from tests.protocol.transitions import Move, Transition
from tests.protocol.values import Values
from tests.protocol.world import (
    STREAMS,
    WRITES,
    Client,
    ClientPlan,
    Kind,
    Outcome,
    PlanKind,
    Request,
    Worker,
    World,
)


def possible_moves(world: World, values: Values) -> Iterator[Move]:
    """Everything that may happen next."""
    distinct_workers = 1 if world.workers[0] == world.workers[1] else 2
    for index, client in enumerate(world.clients):
        for plan in _sendable_plans(client, values.scenario.clients[index]):
            yield from (("send", index, plan, worker) for worker in range(distinct_workers))
    left = world.left
    for index, worker in enumerate(world.workers):
        if not worker.pipeline:
            continue
        yield "exec", index
        # Losing more than the answer to an executed write leaves no further trace.
        cuts = [0] + [at + 1 for at, r in enumerate(worker.pipeline) if r.kind in WRITES]
        breaks = [(cut, 0) for cut in cuts]
        if left.bytes_delayed and len(cuts) > 1:
            breaks.append((0, 1))
        if left.replies_lost:
            yield from (("lose", index, cut, delayed) for cut, delayed in breaks)
        if left.crashes:
            yield from (("crash", index, cut, delayed) for cut, delayed in breaks)
        if left.timeouts and any(r.outcome == Outcome.PENDING for r in worker.pipeline):
            yield "timeout", index
    yield from (("deliver", place) for place in range(len(world.in_transit)))
    if left.rollbacks:
        yield from (("rollback", i) for i, old in enumerate(world.older) if old != world.store)
    for stream, slot in enumerate(world.store):
        if slot.state and left.streams_expired and not _has_late_writes(world, stream, values):
            yield "expire", stream
        if slot.reply and left.replies_expired:
            yield "expire_reply", stream


def _has_late_writes(world: World, stream: int, values: Values) -> bool:
    """Whether writes are in flight for unusually long: streams and tombstones live longer."""
    late = chain.from_iterable(world.in_transit)
    outdated = (r for worker in world.workers for r in worker.pipeline if r.outdated)
    return any(values.plan(r.job).stream == stream for r in chain(late, outdated))


def _sendable_plans(client: Client, owner: ClientPlan) -> Iterator[int]:
    if client.stopped:
        return
    in_flight = sum(s > a for s, a in zip(client.sent, client.applied, strict=True))
    for index, plan in enumerate(owner.plans):
        if client.applied[index]:
            continue
        if client.sent[index]:
            if client.resends and (plan.kind == PlanKind.DELETE or plan.position is not None):
                yield index
        elif in_flight < owner.window and all(client.sent[:index]):
            yield index


class FaultyTransition(Transition):
    """A step without faults, or a fault."""

    def _spend(self, fault: str) -> None:
        self.left = self.left._replace(**{fault: getattr(self.left, fault) - 1})

    def _lose(self, index: int, cut: int, delayed: int) -> None:
        """Break the connection after `cut` requests were executed, without an answer, and repeat
        all pending requests. `delayed`: the bytes are still in transit."""
        self._spend("replies_lost")
        self._cut(index, cut, delayed)
        self._update_worker(index, pipeline=self._repeated(self.workers[index].pipeline))

    def _repeated(self, pipeline: tuple[Request, ...]) -> tuple[Request, ...]:
        """The requests that are repeated on a new connection: pending ones, and earlier writes to
        the same streams, which could otherwise arrive late and make a pending one succeed."""
        forget, awaited = self.values.rules.forget_abandoned, set[int]()
        repeated: list[Request] = []
        for request in reversed(pipeline):
            stream, is_pending = self._stream(request), request.outcome == Outcome.PENDING
            if is_pending or (stream in awaited and not forget):
                repeated.insert(0, request._replace(repeated=1))
                awaited.update((stream,) * (request.kind in WRITES))
        return tuple(repeated)

    def _cut(self, index: int, cut: int, delayed: int) -> None:
        for place in range(cut):
            self._write_unanswered(self.workers[index].pipeline[place])
        if delayed:
            self._spend("bytes_delayed")
            pipeline = self.workers[index].pipeline
            self.in_transit.append(tuple(r for r in pipeline if r.kind in WRITES))

    def _write_unanswered(self, request: Request) -> None:
        """Run a script whose answer is lost; the request may be repeated."""
        if self._write(request):
            self._mark_job(request.job, job=request.job._replace(wrote=request.new or -1))

    def _deliver(self, place: int) -> None:
        """Deliver the first request in transit of a broken connection."""
        request, *rest = self.in_transit.pop(place)
        if rest:
            self.in_transit.append(tuple(rest))
        self._write_unanswered(request)

    def _crash(self, index: int, cut: int, delayed: int) -> None:
        """Kill a worker after `cut` of its requests were executed."""
        self._spend("crashes")
        self._cut(index, cut, delayed)
        self.workers[index] = Worker()

    def _timeout(self, index: int) -> None:
        """Cancel the oldest pending request; a write may still be executed."""
        self._spend("timeouts")
        pipeline = self.workers[index].pipeline
        place = next(i for i, r in enumerate(pipeline) if r.outcome == Outcome.PENDING)
        request, stream = pipeline[place], self._stream(pipeline[place])
        is_write = request.kind in WRITES
        if not is_write:
            self._update_worker(index, pipeline=(*pipeline[:place], *pipeline[place + 1 :]))
        if request.kind == Kind.COMMIT:
            self._drop_cached(index, stream)
        unanswered = self.values.rules.unanswered(STREAMS[stream])
        self._fail(request.job, unanswered if is_write else StoreUnavailable("no answer to a read"))
        self._start_chunks(index, stream)

    def _rollback(self, place: int) -> None:
        """Return the store to earlier contents; all connections break."""
        self._spend("rollbacks")
        self.store = list(self.older[place])
        self.older = self.older[: place + 1]
        self.in_transit = []
        for index, worker in enumerate(self.workers):
            repeated = self._repeated(worker.pipeline)
            self._update_worker(index, pipeline=tuple(r._replace(outdated=0) for r in repeated))

    def _expire(self, stream: int) -> None:
        """A stream was idle for too long."""
        self._spend("streams_expired")
        self.store[stream] = self.store[stream]._replace(state=0, log=())

    def _expire_reply(self, stream: int) -> None:
        """A stored reply is too old."""
        self._spend("replies_expired")
        self.store[stream] = self.store[stream]._replace(reply=0)
