"""One step of the model: what a move makes of the world.

A worker is modelled as it is built: a chunk that continues a copy in memory is computed and its
commit sent at once, any other is loaded first; what is sent goes through one ordered connection
and is carried out from its head; a chunk whose commit is sent lets the stream's next one start.
Carrying out a request and receiving its answer are one step; `breaks` separates them, and adds the
other faults.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from service.core.delivery import Process, Replay, Resolution
from service.core.errors import CarryError, Conflict, StateChanged
from service.store.base import Committed, Conflicted
from tests.protocol.book import Book
from tests.protocol.moves import Move
from tests.protocol.promises import (
    NOT_APPLIED,
    check_answer,
    check_deletion,
    check_failure,
    check_reply,
    check_write,
)
from tests.protocol.words import at, what, who
from tests.protocol.world import (
    STREAMS,
    WRITES,
    BeginPlan,
    ChunkPlan,
    DeletePlan,
    Guard,
    Job,
    Kind,
    Log,
    Request,
    Slot,
    World,
)

BEGIN_TRIES = 2
DELETE_TRIES = 3
BY_EPOCH_FROM = 2
"""A deletion without If-Match expects nothing, then what it found; from this try on its epoch is
enough. The service tries both more often."""


class Step:
    """One move under way; made for one world and used once."""

    def __init__(self, world: World, book: Book, notes: list[str] | None = None):
        self.book = book
        self.store = list(world.store)
        self.older = world.older
        self.workers = list(world.workers)
        self.clients = list(world.clients)
        self.left = world.left
        self.held = list(world.held)
        self.notes = notes
        self._before = world.store

    def make(self, move: Move) -> World:
        """The world after the move.

        Raises:
            Broken: a promise does not hold in it.
        """
        getattr(self, f"_{move[0]}")(*move[1:])
        store = tuple(self.store)
        if self.left.rollbacks == 0:
            self.older = ()
        elif store != self._before and store not in self.older:
            self.older = (*self.older, store)
        workers, clients = tuple(self.workers), tuple(self.clients)
        return World(store, self.older, workers, clients, self.left, tuple(sorted(self.held)))

    def note(self, text: Callable[[], str]) -> None:
        if self.notes is not None:
            self.notes.append(text())

    # What clients do

    def _send(self, client: int, plan: int, index: int) -> None:
        known = self.clients[client]
        number = known.sent[plan]
        what = self.book.scenario.clients[client].plans[plan]
        named = known.last if isinstance(what, ChunkPlan) and what.guard else 0
        job = Job(client, plan, number, named)
        sent = _with(known.sent, plan, number + 1)
        self.clients[client] = known._replace(sent=sent, resends=known.resends - (number > 0))
        self.note(lambda: f"{self._who(job)} sends {self._what(job)} to worker {index + 1}")
        if isinstance(what, ChunkPlan):
            worker = self.workers[index]
            self.workers[index] = worker._replace(waiting=(*worker.waiting, job))
            self._start(index, what.stream)
            return
        # The service drops its copy before it writes; only this worker's.
        self._drop(index, what.stream)
        guarded = isinstance(what, BeginPlan) or what.guarded
        self._ask(index, Request(Kind.READ if guarded else Kind.DELETE, job))

    # What workers do

    def _start(self, index: int, stream: int) -> None:
        """Take up the stream's waiting chunks, until one has to be waited for."""
        while True:
            worker = self.workers[index]
            if any(r.held and self.book.plan(r.job).stream == stream for r in worker.lane):
                return
            job = next((j for j in worker.waiting if self.book.plan(j).stream == stream), None)
            if job is None:
                return
            waiting = tuple(j for j in worker.waiting if j is not job)
            self.workers[index] = worker._replace(waiting=waiting)
            copy = worker.cache[stream]
            if copy and self.book.is_continuation(job, copy):
                self._compute(index, job, copy, "its copy")
                continue
            if copy and self.book.rules.refuse_from_cache and self._refused(index, job, copy):
                continue
            self.note(lambda: f"worker {index + 1} asks the store for {STREAMS[stream]}")
            self._ask(index, Request(Kind.LOAD, job, held=1))
            return

    def _refused(self, index: int, job: Job, copy: int) -> bool:
        evaluation = self.book.evaluate_chunk(job, copy)
        if not isinstance(evaluation, CarryError):
            return False
        self.note(lambda: f"worker {index + 1} judges it by its copy, {self._at(copy)}")
        self._tell(index, job, evaluation)
        return True

    def _compute(self, index: int, job: Job, base: int, whence: str) -> None:
        """Compute a chunk and send its commit."""
        stream = self.book.plan(job).stream
        new = self.book.apply_chunk(job, base)
        worker = self.workers[index]
        self.note(
            lambda: (
                f"worker {index + 1} computes {self._what(job)} from {whence}, {self._at(base)}, "
                f"and sends the commit of {self._at(new)}"
            )
        )
        self.workers[index] = worker._replace(cache=_with(worker.cache, stream, new))
        self._ask(index, Request(Kind.COMMIT, job, base, new))
        if self.book.rules.answer_early and whence == "its copy":
            self._answer(index, job, new)

    def _ask(self, index: int, request: Request) -> None:
        worker = self.workers[index]
        self.workers[index] = worker._replace(lane=(*worker.lane, request))

    def _drop(self, index: int, stream: int) -> None:
        worker = self.workers[index]
        if worker.cache[stream]:
            self.workers[index] = worker._replace(cache=_with(worker.cache, stream, 0))

    def _again(self, index: int, job: Job) -> None:
        """Put a chunk back before those that were never tried."""
        job = job._replace(attempts=job.attempts + 1)
        if job.attempts >= self.book.scenario.attempts:
            self._tell(index, job, _conflict())
            return
        worker = self.workers[index]
        tried = sum(1 for waiting in worker.waiting if waiting.attempts)
        waiting = (*worker.waiting[:tried], job, *worker.waiting[tried:])
        self.workers[index] = worker._replace(waiting=waiting)

    # What the store does

    def _exec(self, index: int) -> None:
        """Carry out the head of a worker's connection; its answer is received."""
        worker = self.workers[index]
        request = worker.lane[0]
        self.workers[index] = worker._replace(lane=worker.lane[1:])
        stream = self.book.plan(request.job).stream
        if request.orphan:
            self._write(request)
            return
        {
            Kind.LOAD: self._loaded,
            Kind.RETRY: self._retried,
            Kind.READ: self._was_read,
            Kind.COMMIT: self._committed,
            Kind.BEGIN: self._committed,
            Kind.DELETE: self._deleted,
        }[Kind(request.kind)](index, request)
        self._start(index, stream)

    def _loaded(self, index: int, request: Request) -> None:
        job, slot = request.job, self._read(request)
        self.note(lambda: f"the store gives worker {index + 1} {self._stands(request)}")
        evaluation = self.book.evaluate_chunk(job, slot.state)
        if isinstance(evaluation, Process):
            self._compute(index, job, slot.state, "it")
        elif isinstance(evaluation, Replay):
            self.note(
                lambda: (
                    f"it is {self._stream(request)}'s last chunk: worker {index + 1} asks again, "
                    "for state and reply"
                )
            )
            self._ask(index, Request(Kind.RETRY, job, slot.state, held=1))
        else:
            self._tell(index, job, evaluation)

    def _retried(self, index: int, request: Request) -> None:
        job, slot = request.job, self._read(request)
        self.note(lambda: f"the store gives worker {index + 1} {self._stands(request)}")
        answer = self.book.retry(job, request.base, slot.state, slot.reply, request.new)
        if answer is Resolution.STORED_REPLY:
            self._answer(index, job, slot.reply)
        elif answer is Resolution.OWN_REPLY:
            self._answer(index, job, request.new)
        elif answer is Resolution.RE_EVALUATE:
            self._again(index, job)
        else:
            self._tell(index, job, answer)

    def _was_read(self, index: int, request: Request) -> None:
        """The first half of a guarded deletion, a restore or a fork."""
        job, plan = request.job, self.book.plan(request.job)
        source = plan.source if isinstance(plan, BeginPlan) else plan.stream
        slot = self.store[source]
        self.book.read(source, slot.state, slot.reply)
        if not self.book.stream(slot.state):
            self.note(lambda: f"{self._who(job)} is told that there is no {STREAMS[source]}")
        elif isinstance(plan, DeletePlan):
            self.note(lambda: f"worker {index + 1} sends the deletion of {self._at(slot.state)}")
            self._ask(index, Request(Kind.DELETE, job, slot.state))
        else:
            new = self.book.begin(job, slot.state)
            base = self.store[plan.stream].state
            if source != plan.stream and self.book.stream(base):
                base = 0  # it is told so before its commit; here the store refuses it
            self.note(lambda: f"worker {index + 1} sends the commit of {self._at(new)}")
            self._ask(index, Request(Kind.BEGIN, job, base, new, log=slot.log))

    def _committed(self, index: int, request: Request) -> None:
        job = request.job
        stream = self.book.plan(job).stream
        if self._write(request):
            self._answer(index, job, request.new)
            return
        found = self.store[stream].state
        result: Any = Conflicted(self.book.head(found))
        if request.repeated:
            result = self.book.resolve_retried_commit(stream, request.base, request.new, found)
        if isinstance(result, Committed):
            self._answer(index, job, request.new)
            return
        if request.kind == Kind.BEGIN:
            self._not_begun(index, request, found, result)
            return
        self._drop(index, stream)
        if isinstance(result, CarryError):
            self._tell(index, job, result)
            return
        answer = self.book.resolve_conflict(job, request.new, found)
        if answer is Resolution.RE_EVALUATE:
            self._again(index, job)
        elif answer is Resolution.OWN_REPLY:
            self._answer(index, job, request.new)
        else:
            self.note(
                lambda: f"it is the head of its own commit: worker {index + 1} asks for the reply"
            )
            self._ask(index, Request(Kind.RETRY, job, found, request.new))

    def _not_begun(self, index: int, request: Request, found: int, result: Any) -> None:
        """A restore is bound to what it read; a fork is tried again where no stream was found."""
        job, plan = request.job, self.book.plan(request.job)
        again = job._replace(attempts=job.attempts + 1)
        if isinstance(result, CarryError):
            self._tell(index, job, result)
        elif plan.source == plan.stream or self.book.stream(found) or again.attempts == BEGIN_TRIES:
            self._tell(index, job, _changed())
        else:
            new = self.book.begin(again, request.new)
            self._ask(index, Request(Kind.BEGIN, again, found, new, log=request.log))

    def _deleted(self, index: int, request: Request) -> None:
        job, stream = request.job, self.book.plan(request.job).stream
        done, found = self._write(request), self.store[stream].state
        if done:
            self._answer(index, job, 0)
        elif self.book.plan(job).guarded:
            result: Any = Conflicted(self.book.head(found))
            if request.repeated:
                result = self.book.resolve_retried_deletion(stream, request.base, found)
            if isinstance(result, Committed):
                self._answer(index, job, 0)
            else:
                self._tell(index, job, result if isinstance(result, CarryError) else _changed())
        elif job.attempts + 1 < DELETE_TRIES:
            again = job._replace(attempts=job.attempts + 1)
            self._ask(index, Request(Kind.DELETE, again, found, repeated=request.repeated))
        else:
            unknown = self.book.rules.unanswered(STREAMS[stream])
            self._tell(index, job, unknown if request.repeated else _conflict())

    def _write(self, request: Request) -> bool:
        """Let a script run; whether it wrote."""
        job, plan = request.job, self.book.plan(request.job)
        stream = plan.stream
        slot = self.store[stream]
        if request.kind == Kind.DELETE:
            state, reply, done = self.book.delete(
                stream,
                slot.state,
                slot.reply,
                request.base,
                self.book.tombstone(job),
                job.attempts >= BY_EPOCH_FROM,
            )
            log: Log = () if done else slot.log
        elif request.kind in WRITES:
            state, reply, done = self.book.commit(
                stream, slot.state, slot.reply, request.base, request.new
            )
            log = slot.log
            if done and request.kind == Kind.BEGIN:
                log = request.log
            elif done:
                log = (*slot.log, (self.book.uid(job), request.new))
        else:
            return False
        self.store[stream] = Slot(state, reply, log)
        verb = {Kind.COMMIT: "commit", Kind.BEGIN: "new beginning", Kind.DELETE: "deletion"}
        self.note(
            lambda: (
                f"the store carries out the {verb[Kind(request.kind)]} of "
                f"{self._what(job)}, which expects {self._at(request.base)}: "
                + ("written" if done else f"refused, it finds {self._at(slot.state)}")
            )
        )
        if done:
            check_write(self.book, request, slot, self.store[stream])
            self._mark(lambda r: self._outdates(request, r), stale=1)
        check_reply(STREAMS[stream], self.store[stream])
        return done

    def _mark(self, choose: Callable[[Request], Any], **values: Any) -> None:
        """Change the selected requests among all in flight."""

        def marked(requests: tuple[Request, ...]) -> tuple[Request, ...]:
            return tuple(r._replace(**values) if choose(r) else r for r in requests)

        self.workers = [w._replace(lane=marked(w.lane)) for w in self.workers]
        self.held = [marked(requests) for requests in self.held]

    def _outdates(self, written: Request, other: Request) -> bool:
        """Whether a sent write must not be applied after this one."""
        one, two = self.book.plan(written.job), self.book.plan(other.job)
        if other.kind not in WRITES or one.stream != two.stream:
            return False
        if (written.kind == Kind.DELETE) == (other.kind == Kind.DELETE):
            return False
        if written.kind == Kind.DELETE or other.orphan > 1:
            return True
        old, new = self.book.expected(other.base), self.book.head(written.new)
        return other.orphan == 1 and (old is None or old.epoch != new.epoch)

    # What clients are told

    def _answer(self, index: int, job: Job, state: int) -> None:
        """A success: it must be in the history that survives, as it is answered."""
        plan = self.book.plan(job)
        slot = self.store[plan.stream]
        self.note(lambda: f"worker {index + 1} answers {self._what(job)} with {self._at(state)}")
        self._mark(lambda r: r.job[:3] == job[:3], orphan=3)
        client = self.clients[job.client]
        if isinstance(plan, ChunkPlan):
            check_answer(self.book, job, state, slot, client)
            client = client._replace(last=state)
        elif isinstance(plan, DeletePlan):
            check_deletion(self.book, job, slot, client)
        known = _with(client.known, job.plan, 1)
        self.clients[job.client] = client._replace(known=known)

    def _tell(self, index: int, job: Job, error: CarryError) -> None:
        """A failure: what it says must be so."""
        plan = self.book.plan(job)
        slot = self.store[plan.stream]
        self.note(
            lambda: (
                f"worker {index + 1} answers {self._what(job)} with {error.code}"
                + (f", expected {error.facts['expected']}" if "expected" in error.facts else "")
            )
        )
        check_failure(self.book, job, error, slot, self.clients[job.client])
        denied = error.code in NOT_APPLIED
        self._mark(lambda r: r.job[:3] == job[:3], orphan=2 if denied else 1)
        if isinstance(plan, ChunkPlan):
            self._learn(job, plan, error)

    def _learn(self, job: Job, plan: ChunkPlan, error: CarryError) -> None:
        """What the client makes of a failure."""
        client = self.clients[job.client]
        plans = self.book.scenario.clients[job.client].plans
        if error.code == "position_ahead":
            expected = error.facts["expected"]
            known = tuple(
                known if getattr(p, "position", None) is None or p.position < expected else 0
                for known, p in zip(client.known, plans, strict=True)
            )
            last = client.last if plan.guard is Guard.NONE else 0
            self.clients[job.client] = client._replace(known=known, last=last)
        elif error.code in ("state_changed", "epoch_mismatch"):
            self.clients[job.client] = client._replace(
                known=(0,) * len(client.known), last=0, stopped=1
            )
        elif error.code in ("already_applied", "position_behind"):
            if self.book.scenario.clients[job.client].alone:
                known = _with(client.known, job.plan, 1)
                self.clients[job.client] = client._replace(known=known)
            else:
                self.clients[job.client] = client._replace(stopped=1)

    # Words

    def _read(self, request: Request) -> Slot:
        stream = self.book.plan(request.job).stream
        slot = self.store[stream]
        self.book.read(stream, slot.state, slot.reply)
        return slot

    def _who(self, job: Job) -> str:
        return who(self.book, job)

    def _what(self, job: Job) -> str:
        return what(self.book, job)

    def _stream(self, request: Request) -> str:
        return STREAMS[self.book.plan(request.job).stream]

    def _stands(self, request: Request) -> str:
        slot = self.store[self.book.plan(request.job).stream]
        return f"{self._stream(request)}: {self._at(slot.state)}"

    def _at(self, state: int) -> str:
        return at(self.book, state)


def _with(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _conflict() -> CarryError:
    return Conflict("moved on by others too often")


def _changed() -> CarryError:
    return StateChanged("not the state that was named")
