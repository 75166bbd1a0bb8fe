"""The steps of clients, workers and store without faults.

A worker is modelled as it is built: a chunk that is_continuation a cached state is computed and its
commit sent at once, any other is loaded first; requests go through one pipelined connection and
are executed in order; a chunk whose commit is sent lets the stream's next one start. Executing a
request and receiving its answer are one step; `faults` separates them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from service.core.delivery import Process, Replay, Resolution
from service.core.errors import CarryError, Conflict, StateChanged
from service.store.base import Committed, Conflicted
from tests.protocol.invariants import (
    NOT_APPLIED,
    check_acknowledged_chunk,
    check_acknowledged_deletion,
    check_failure,
    check_stored_reply,
    check_write,
)
from tests.protocol.values import Values
from tests.protocol.world import (
    STREAMS,
    WRITES,
    Guard,
    Job,
    Kind,
    Outcome,
    PlanKind,
    Request,
    Slot,
    Worker,
    World,
)

COPY_TRIES = 2
DELETE_TRIES = 3
BY_EPOCH_FROM = 2
"""A deletion without If-Match expects nothing, then what it read; from this try on its epoch is
enough. The service tries both more often."""

Move = tuple[Any, ...]
"""The name of a `Transition` method without its underscore, and its arguments."""


class Transition:
    """One step from one world; used once.

    Attributes:
        replies: what clients were answered in this step: states or error codes, for traces.
    """

    def __init__(self, world: World, values: Values):
        self.values = values
        self.store = list(world.store)
        self.older = world.older
        self.workers = list(world.workers)
        self.clients = list(world.clients)
        self.left = world.left
        self.in_transit = list(world.in_transit)
        self.replies: list[tuple[Job, int | str]] = []
        self._store_before = world.store

    def apply(self, move: Move) -> World:
        """The world after the move.

        Raises:
            Violation
        """
        getattr(self, f"_{move[0]}")(*move[1:])
        store = tuple(self.store)
        if self.left.rollbacks == 0:
            self.older = ()
        elif store != self._store_before and store not in self.older:
            self.older = (*self.older, store)
        workers, clients = tuple(self.workers), tuple(self.clients)
        return World(store, self.older, workers, clients, self.left, tuple(sorted(self.in_transit)))

    def _update_worker(self, index: int, **changes: Any) -> None:
        self.workers[index] = self.workers[index]._replace(**changes)

    def _update_client(self, index: int, **changes: Any) -> None:
        self.clients[index] = self.clients[index]._replace(**changes)

    def _stream(self, request: Request) -> int:
        return self.values.plan(request.job).stream

    # Clients send

    def _send(self, client: int, plan_index: int, index: int) -> None:
        state, plan = self.clients[client], self.values.scenario.clients[client].plans[plan_index]
        number, is_chunk = state.sent[plan_index], plan.kind == PlanKind.CHUNK
        job = Job(client, plan_index, number, state.last if is_chunk and plan.guard else 0)
        sent = replace_at(state.sent, plan_index, number + 1)
        self._update_client(client, sent=sent, resends=state.resends - (number > 0))
        if is_chunk:
            self._update_worker(index, waiting=(*self.workers[index].waiting, job))
            self._start_chunks(index, plan.stream)
            return
        # The service drops its cached state before it writes; only this worker's.
        self._drop_cached(index, plan.stream)
        reads_first = plan.kind == PlanKind.COPY or plan.guard
        self._request(index, Request(Kind.READ if reads_first else Kind.DELETE, job))

    # Workers

    def _start_chunks(self, index: int, stream: int) -> None:
        """Start waiting chunks of the stream, until one needs the store."""
        values = self.values
        while not any(r.blocks and self._stream(r) == stream for r in self.workers[index].pipeline):
            worker = self.workers[index]
            job = next((j for j in worker.waiting if values.plan(j).stream == stream), None)
            if job is None:
                return
            self._update_worker(index, waiting=tuple(j for j in worker.waiting if j is not job))
            cached = worker.cache[stream]
            if cached and values.is_continuation(job, cached):
                new = self._compute(index, job, cached)
                if values.rules.answer_early:
                    self._acknowledge(job, new)
                continue
            if cached and values.rules.reject_from_cache:
                verdict = values.evaluate_chunk(job, cached)
                if isinstance(verdict, CarryError):
                    self._fail(job, verdict)
                    continue
            self._request(index, Request(Kind.LOAD, job, blocks=1))

    def _compute(self, index: int, job: Job, base: int) -> int:
        """Compute a chunk, send its commit, and return the new state."""
        new = self.values.advance(job, base)
        cache = replace_at(self.workers[index].cache, self.values.plan(job).stream, new)
        self._update_worker(index, cache=cache)
        self._request(index, Request(Kind.COMMIT, job, base, new))
        return new

    def _request(self, index: int, request: Request) -> None:
        self._update_worker(index, pipeline=(*self.workers[index].pipeline, request))

    def _drop_cached(self, index: int, stream: int) -> None:
        self._update_worker(index, cache=replace_at(self.workers[index].cache, stream, 0))

    def _retry(self, index: int, job: Job) -> None:
        """Let a chunk wait again, before those that were never tried."""
        job = job._replace(attempts=job.attempts + 1)
        if job.attempts >= self.values.scenario.attempts:
            self._fail(job, Conflict("too many version conflicts"))
            return
        waiting = self.workers[index].waiting
        tried = sum(1 for other in waiting if other.attempts)
        self._update_worker(index, waiting=(*waiting[:tried], job, *waiting[tried:]))

    # The store executes, and the worker receives the answer

    def _exec(self, index: int) -> None:
        """Execute the first request of a worker's connection; its answer is received."""
        request, *rest = self.workers[index].pipeline
        self._update_worker(index, pipeline=tuple(rest))
        if request.outcome != Outcome.PENDING:
            self._write(request)
            return
        RECEIVE[request.kind](self, index, request)
        self._start_chunks(index, self._stream(request))

    def _read(self, request: Request) -> Slot:
        stream = self._stream(request)
        slot = self.store[stream]
        self.values.record_read(stream, slot.state, slot.reply)
        return slot

    def _on_loaded(self, index: int, request: Request) -> None:
        slot = self._read(request)
        verdict = self.values.evaluate_chunk(request.job, slot.state)
        if isinstance(verdict, Process):
            self._compute(index, request.job, slot.state)
        elif isinstance(verdict, Replay):
            self._request(index, Request(Kind.RETRY, request.job, slot.state, blocks=1))
        else:
            self._fail(request.job, verdict)

    def _on_reread(self, index: int, request: Request) -> None:
        """State and reply were read for a chunk that is the stream's last."""
        job, slot = request.job, self._read(request)
        answer = self.values.resolve_duplicate(
            job, request.base, slot.state, slot.reply, request.new
        )
        if answer is Resolution.RE_EVALUATE:
            self._retry(index, job)
        elif isinstance(answer, Resolution):
            self._acknowledge(job, slot.reply if answer is Resolution.STORED_REPLY else request.new)
        else:
            self._fail(job, answer)

    def _on_read(self, index: int, request: Request) -> None:
        """The first half of a guarded deletion, a restore or a fork."""
        job, plan = request.job, self.values.plan(request.job)
        source = plan.source if plan.kind == PlanKind.COPY else plan.stream
        slot = self.store[source]
        self.values.record_read(source, slot.state, slot.reply)
        if not self.values.stream(slot.state):
            self.replies.append((job, "not_found"))
        elif plan.kind == PlanKind.DELETE:
            self._request(index, Request(Kind.DELETE, job, slot.state))
        else:
            base = self.store[plan.stream].state
            if source != plan.stream and self.values.stream(base):
                base = 0  # the service reports this before its commit; here the store rejects it
            new = self.values.copy(job, slot.state)
            self._request(index, Request(Kind.COPY, job, base, new, log=slot.log))

    def _on_committed(self, index: int, request: Request) -> None:
        job, stream = request.job, self._stream(request)
        if self._write(request):
            self._acknowledge(job, request.new)
            return
        state = self.store[stream].state
        result: Any = Conflicted(self.values.head(state))
        if request.repeated:
            result = self.values.resolve_retried_commit(job, request.base, request.new, state)
        if isinstance(result, Committed):
            self._acknowledge(job, request.new)
            return
        if request.kind == Kind.COMMIT:
            self._drop_cached(index, stream)
        if isinstance(result, CarryError):
            self._fail(job, result)
        elif request.kind == Kind.COPY:
            self._on_copy_conflict(index, request, state)
        else:
            answer = self.values.resolve_conflict(job, request.new, state)
            if answer is Resolution.RE_EVALUATE:
                self._retry(index, job)
            elif answer is Resolution.OWN_REPLY:
                self._acknowledge(job, request.new)
            else:
                self._request(index, Request(Kind.RETRY, job, state, request.new))

    def _on_copy_conflict(self, index: int, request: Request, state: int) -> None:
        """A restore is bound to what it read; a fork is retried where there is no stream."""
        plan = self.values.plan(request.job)
        job = request.job._replace(attempts=request.job.attempts + 1)
        if plan.source == plan.stream or self.values.stream(state) or job.attempts == COPY_TRIES:
            self._fail(request.job, _state_changed())
            return
        new = self.values.copy(job, request.new)
        self._request(index, Request(Kind.COPY, job, state, new, log=request.log))

    def _on_deleted(self, index: int, request: Request) -> None:
        job, stream = request.job, self._stream(request)
        if self._write(request):
            self._acknowledge(job, 0)
            return
        state = self.store[stream].state
        if self.values.plan(job).guard is Guard.IF_MATCH:
            result: Any = None
            if request.repeated:
                result = self.values.resolve_retried_deletion(job, request.base, state)
            if isinstance(result, Committed):
                self._acknowledge(job, 0)
            else:
                self._fail(job, result if isinstance(result, CarryError) else _state_changed())
        elif job.attempts + 1 < DELETE_TRIES:
            again = job._replace(attempts=job.attempts + 1)
            self._request(index, Request(Kind.DELETE, again, state, repeated=request.repeated))
        elif request.repeated:
            self._fail(job, self.values.rules.unanswered(STREAMS[stream]))
        else:
            self._fail(job, Conflict("too many version conflicts"))

    def _write(self, request: Request) -> bool:
        """Run a script; whether it wrote."""
        job, stream = request.job, self._stream(request)
        if request.kind not in WRITES:
            return False
        kind, new = "commit", request.new
        if request.kind == Kind.DELETE:
            kind = "delete by epoch" if job.attempts >= BY_EPOCH_FROM else "delete"
            new = self.values.tombstone(job)
        before = self.store[stream]
        state, reply, done = self.values.run_script(
            kind, stream, before.state, before.reply, request.base, new
        )
        log = before.log
        if done:
            chunk = (self.values.uid(job), request.new)
            log = (*log, chunk) if request.kind == Kind.COMMIT else request.log
        self.store[stream] = after = Slot(state, reply, log)
        if done:
            check_write(self.values, request, before, after)
            self._mark(lambda other: self._outdates(request, other), outdated=1)
        check_stored_reply(STREAMS[stream], after)
        return done

    def _mark(self, chosen: Callable[[Request], Any], **changes: Any) -> None:
        """Change the chosen requests among all in flight."""

        def marked(requests: tuple[Request, ...]) -> tuple[Request, ...]:
            return tuple(r._replace(**changes) if chosen(r) else r for r in requests)

        self.workers = [
            Worker(cache, marked(pipeline), waiting) for cache, pipeline, waiting in self.workers
        ]
        self.in_transit = [marked(requests) for requests in self.in_transit]

    def _mark_job(self, marked: Job, **changes: Any) -> None:
        self._mark(lambda request: request.job[:3] == marked[:3], **changes)

    def _outdates(self, written: Request, other: Request) -> bool:
        """Whether a sent write must not be applied after this one."""
        if other.kind not in WRITES or self._stream(written) != self._stream(other):
            return False
        if (written.kind == Kind.DELETE) == (other.kind == Kind.DELETE):
            return False
        if written.kind == Kind.DELETE or other.outcome > Outcome.UNKNOWN:
            return True
        old, new = self.values.expected(other.base), self.values.head(written.new)
        return other.outcome == Outcome.UNKNOWN and (old is None or old.epoch != new.epoch)

    # Clients are answered

    def _acknowledge(self, job: Job, state: int) -> None:
        """A success: it must be in the surviving history, as it is answered."""
        plan, client = self.values.plan(job), self.clients[job.client]
        slot = self.store[plan.stream]
        self.replies.append((job, state))
        self._mark_job(job, outcome=Outcome.APPLIED)
        if plan.kind == PlanKind.CHUNK:
            check_acknowledged_chunk(self.values, job, state, slot, client)
            self._update_client(job.client, last=state)
        elif plan.kind == PlanKind.DELETE:
            check_acknowledged_deletion(self.values, job, slot, client)
        self._update_client(job.client, applied=replace_at(client.applied, job.plan, 1))

    def _fail(self, job: Job, error: CarryError) -> None:
        """A failure: what it says must be true."""
        plan = self.values.plan(job)
        self.replies.append((job, error.code))
        check_failure(self.values, job, error, self.store[plan.stream], self.clients[job.client])
        denied = error.code in NOT_APPLIED
        self._mark_job(job, outcome=Outcome.NOT_APPLIED if denied else Outcome.UNKNOWN)
        if plan.kind == PlanKind.CHUNK:
            self._learn(job, error)

    def _learn(self, job: Job, error: CarryError) -> None:
        """What a client concludes from a failed chunk."""
        client, owner = self.clients[job.client], self.values.scenario.clients[job.client]
        if error.code == "position_ahead":
            expected = error.facts["expected"]
            applied = tuple(
                known if plan.position is None or plan.position < expected else 0
                for known, plan in zip(client.applied, owner.plans, strict=True)
            )
            last = 0 if self.values.plan(job).guard else client.last
            self._update_client(job.client, applied=applied, last=last)
        elif error.code in ("state_changed", "epoch_mismatch"):
            nothing = (0,) * len(client.applied)
            self._update_client(job.client, applied=nothing, last=0, stopped=1)
        elif error.code in ("already_applied", "position_behind"):
            if owner.alone:
                self._update_client(job.client, applied=replace_at(client.applied, job.plan, 1))
            else:
                self._update_client(job.client, stopped=1)


RECEIVE = {
    Kind.LOAD: Transition._on_loaded,
    Kind.RETRY: Transition._on_reread,
    Kind.READ: Transition._on_read,
    Kind.COMMIT: Transition._on_committed,
    Kind.COPY: Transition._on_committed,
    Kind.DELETE: Transition._on_deleted,
}
"""What receives the answer to each request."""


def replace_at(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    """The tuple with one value replaced."""
    return (*values[:index], value, *values[index + 1 :])


def _state_changed() -> CarryError:
    return StateChanged("not the state that was named")
