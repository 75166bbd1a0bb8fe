"""One step of the model: what may happen next, what it makes of the world, and what must hold.

A worker is modelled as it is built: a chunk that continues a copy in memory is computed and its
commit sent at once, any other is loaded first; what is sent goes through one ordered connection
and is carried out from its head; a chunk whose commit is sent lets the stream's next one start.
Carrying out a request and receiving its answer are one step; where they part, the answer is lost
and the request is repeated (`lose`), abandoned (`timeout`) or its worker dies (`crash`).

A broken promise raises `Broken` with one sentence. With `notes`, a step also says what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from service.delivery import Answer, Process, Replay
from service.errors import CarryError, Conflict, StateChanged, StoreUnavailable
from service.state.protocol import Committed, Conflicted
from tests.protocol.book import Book
from tests.protocol.world import (
    STREAMS,
    BeginPlan,
    ChunkPlan,
    Client,
    DeletePlan,
    Guard,
    Job,
    Kind,
    Log,
    Request,
    Slot,
    Worker,
    World,
)

Move = tuple[Any, ...]

# What says for certain that the request it answers was not applied.
NOT_APPLIED = frozenset(
    {
        "position_ahead",
        "epoch_mismatch",
        "state_changed",
        "stream_exists",
        "conflict",
        "store_unavailable",
    }
)
WRITES = (Kind.COMMIT, Kind.BEGIN, Kind.DELETE)


class Broken(Exception):
    """A promise of the protocol does not hold."""


def moves(world: World, book: Book) -> Iterator[Move]:
    """Everything that may happen next."""
    for index, client in enumerate(world.clients):
        for plan in _sendable(client, book.scenario.clients[index]):
            for worker in range(_distinct(world.workers)):
                yield "send", index, plan, worker
    left = world.left
    for index, worker in enumerate(world.workers):
        if worker.lane:
            yield "exec", index
            # What is lost beyond a write that was carried out: nothing that leaves a trace.
            cuts = [0] + [i + 1 for i, r in enumerate(worker.lane) if r.kind in WRITES]
            if left.replies_lost:
                yield from (("lose", index, cut) for cut in cuts)
            if left.crashes:
                yield from (("crash", index, cut) for cut in cuts)
            if left.timeouts and not all(request.orphan for request in worker.lane):
                yield "timeout", index
    if left.rollbacks:
        yield from (("rollback", i) for i, old in enumerate(world.older) if old != world.store)
    for stream, slot in enumerate(world.store):
        if slot.state and left.streams_expired:
            yield "expire", stream
        if slot.reply and left.replies_expired:
            yield "expire_reply", stream


def _distinct(workers: tuple[Worker, ...]) -> int:
    return 1 if workers[0] == workers[1] else 2


def _sendable(client: Client, plan: Any) -> Iterator[int]:
    if client.stopped:
        return
    open_ = sum(1 for sent, known in zip(client.sent, client.known, strict=True) if sent > known)
    for index, (sent, known) in enumerate(zip(client.sent, client.known, strict=True)):
        if known:
            continue
        if sent:
            if client.resends and _may_repeat(plan.plans[index]):
                yield index
        elif open_ < plan.window and all(client.sent[:index]):
            yield index


def _may_repeat(plan: Any) -> bool:
    return isinstance(plan, ChunkPlan) and plan.position is not None


class Step:
    """One move under way; made for one world and used once."""

    def __init__(self, world: World, book: Book, notes: list[str] | None = None):
        self.book = book
        self.store = list(world.store)
        self.older = world.older
        self.workers = list(world.workers)
        self.clients = list(world.clients)
        self.left = world.left
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
        # The two workers are alike: which is called the first makes no other world.
        return World(store, self.older, tuple(self.workers), tuple(self.clients), self.left)

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
            if copy and self.book.continues(job, copy):
                self._compute(index, job, copy, "its copy")
                continue
            if copy and self.book.rules.refuse_from_cache and self._refused(index, job, copy):
                continue
            self.note(lambda: f"worker {index + 1} asks the store for {STREAMS[stream]}")
            self._ask(index, Request(Kind.LOAD, job, held=1))
            return

    def _refused(self, index: int, job: Job, copy: int) -> bool:
        verdict = self.book.judge(job, copy)
        if not isinstance(verdict, CarryError):
            return False
        self.note(lambda: f"worker {index + 1} judges it by its copy, {self._at(copy)}")
        self._tell(index, job, verdict)
        return True

    def _compute(self, index: int, job: Job, base: int, whence: str) -> None:
        """Compute a chunk and send its commit."""
        stream = self.book.plan(job).stream
        new = self.book.advance(job, base)
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
            self._write(index, request)
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
        verdict = self.book.judge(job, slot.state)
        if isinstance(verdict, Process):
            self._compute(index, job, slot.state, "it")
        elif isinstance(verdict, Replay):
            self.note(
                lambda: (
                    f"it is {self._stream(request)}'s last chunk: worker {index + 1} asks again, "
                    "for state and reply"
                )
            )
            self._ask(index, Request(Kind.RETRY, job, slot.state, held=1))
        else:
            self._tell(index, job, verdict)

    def _retried(self, index: int, request: Request) -> None:
        job, slot = request.job, self._read(request)
        self.note(lambda: f"the store gives worker {index + 1} {self._stands(request)}")
        answer = self.book.retry(job, request.base, slot.state, slot.reply, request.new)
        if answer is Answer.STORED:
            self._answer(index, job, slot.reply)
        elif answer is Answer.OWN:
            self._answer(index, job, request.new)
        elif answer is Answer.ANEW:
            self._again(index, job)
        else:
            self._tell(index, job, answer)

    def _was_read(self, index: int, request: Request) -> None:
        """The first half of a guarded deletion, a restore or a fork."""
        job, plan = request.job, self.book.plan(request.job)
        source = plan.source if isinstance(plan, BeginPlan) else plan.stream
        slot = self.store[source]
        self.book.read(source, slot.state, slot.reply)
        if not slot.state:
            self.note(lambda: f"{self._who(job)} is told that there is no {STREAMS[source]}")
        elif isinstance(plan, DeletePlan):
            self.note(lambda: f"worker {index + 1} sends the deletion of {self._at(slot.state)}")
            self._ask(index, Request(Kind.DELETE, job, slot.state))
        else:
            new = self.book.begin(job, slot.state)
            base = slot.state if source == plan.stream else 0
            self.note(lambda: f"worker {index + 1} sends the commit of {self._at(new)}")
            self._ask(index, Request(Kind.BEGIN, job, base, new, log=slot.log))

    def _committed(self, index: int, request: Request) -> None:
        job = request.job
        stream = self.book.plan(job).stream
        if self._write(index, request):
            self._answer(index, job, request.new)
            return
        found = self.store[stream].state
        result: Any = Conflicted(self.book.mark(found))
        if request.repeated:
            result = self.book.settle(stream, request.base, request.new, found)
        if isinstance(result, Committed):
            self._answer(index, job, request.new)
            return
        if request.kind == Kind.BEGIN:
            if found != request.new:
                self._tell(index, job, result if isinstance(result, CarryError) else _changed())
            return
        self._drop(index, stream)
        if isinstance(result, CarryError):
            self._tell(index, job, result)
            return
        answer = self.book.after_conflict(job, request.new, found)
        if answer is Answer.ANEW:
            self._again(index, job)
        elif answer is Answer.OWN:
            self._answer(index, job, request.new)
        else:
            self.note(
                lambda: f"it is the mark of its own commit: worker {index + 1} asks for the reply"
            )
            self._ask(index, Request(Kind.RETRY, job, found, request.new))

    def _deleted(self, index: int, request: Request) -> None:
        job, stream = request.job, self.book.plan(request.job).stream
        if self._write(index, request):
            return
        found = self.store[stream].state
        result: Any = Conflicted(self.book.mark(found))
        if request.repeated:
            result = self.book.settle_deletion(stream, request.base, found)
        if isinstance(result, CarryError):
            self._tell(index, job, result)
        elif isinstance(result, Conflicted) and found:
            self._tell(index, job, _changed())

    def _write(self, index: int, request: Request) -> bool:
        """Let a script run; whether it wrote."""
        job, plan = request.job, self.book.plan(request.job)
        stream = plan.stream
        slot = self.store[stream]
        if request.kind == Kind.DELETE:
            state, reply, done = self.book.delete(stream, slot.state, slot.reply, request.base)
            log: Log = slot.log if state else ()
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
                f"the store carries out worker {index + 1}'s {verb[Kind(request.kind)]} of "
                f"{self._what(job)}, which expects {self._at(request.base)}: "
                + ("written" if done else f"refused, it finds {self._at(slot.state)}")
            )
        )
        if done and request.kind != Kind.DELETE:
            self._check_write(request, slot, self.store[stream])
        if reply and state and reply != state:
            raise Broken(f"the reply that is kept of {STREAMS[stream]} is another commit's")
        return done

    def _check_write(self, request: Request, before: Slot, after: Slot) -> None:
        stream, job = STREAMS[self.book.plan(request.job).stream], request.job
        if request.base and not before.state:
            raise Broken(f"{stream} was gone, and a commit that expected it brought it back")
        if request.orphan == 2:
            raise Broken(
                f"{self._who(job)} was told that nothing was applied of "
                f"{self._what(job)}, and it is written now"
            )
        uids = [uid for uid, _ in after.log]
        if len(set(uids)) != len(uids):
            raise Broken(f"{stream} holds {self._what(job)} twice")
        events = tuple(digit for uid in uids for digit in self.book.events(uid))
        if self.book.past(after.state) != events:
            raise Broken(
                f"{stream} is in a state of the events {self.book.past(after.state)}, "
                f"and its history is {events}"
            )

    # What breaks

    def _lose(self, index: int, cut: int) -> None:
        """The connection breaks after `cut` requests were carried out; no answer came, and all
        that somebody waits for is sent again."""
        self.left = self.left._replace(replies_lost=self.left.replies_lost - 1)
        self.note(
            lambda: (
                f"the connection of worker {index + 1} breaks"
                + (f", after {cut} of its requests were carried out" if cut else "")
            )
        )
        self._cut(index, cut)
        worker = self.workers[index]
        self.workers[index] = worker._replace(
            lane=tuple(r._replace(repeated=1) for r in worker.lane if not r.orphan)
        )

    def _cut(self, index: int, cut: int) -> None:
        lane = list(self.workers[index].lane)
        for at, request in enumerate(lane[:cut]):
            if request.kind in WRITES and self._write(index, request):
                lane[at] = request._replace(job=request.job._replace(wrote=request.new or -1))
        self.workers[index] = self.workers[index]._replace(lane=tuple(lane))

    def _crash(self, index: int, cut: int) -> None:
        self.left = self.left._replace(crashes=self.left.crashes - 1)
        self.note(
            lambda: (
                f"worker {index + 1} is killed"
                + (f", after {cut} of its requests were carried out" if cut else "")
            )
        )
        self._cut(index, cut)
        self.workers[index] = Worker((0,) * len(STREAMS))

    def _timeout(self, index: int) -> None:
        """The oldest request that is waited for is given up; it may yet be carried out."""
        self.left = self.left._replace(timeouts=self.left.timeouts - 1)
        worker = self.workers[index]
        at = next(i for i, request in enumerate(worker.lane) if not request.orphan)
        request = worker.lane[at]
        stream = self.book.plan(request.job).stream
        self.note(lambda: f"worker {index + 1} waited long enough for {self._what(request.job)}")
        writes = request.kind in WRITES
        error = self.book.rules.unanswered(STREAMS[stream]) if writes else _unavailable()
        denied = error.code in NOT_APPLIED
        left = (request._replace(orphan=2 if denied else 1),) if writes else ()
        lane = (*worker.lane[:at], *left, *worker.lane[at + 1 :])
        self.workers[index] = worker._replace(lane=lane)
        if request.kind == Kind.COMMIT:
            self._drop(index, stream)
        self._tell(index, request.job, error)
        self._start(index, stream)

    def _rollback(self, at: int) -> None:
        """The store is what it was; connections broke."""
        self.left = self.left._replace(rollbacks=self.left.rollbacks - 1)
        self.store = list(self.older[at])
        self.older = self.older[: at + 1]
        self.note(lambda: "the store is stopped and started on what it held before")
        for index, worker in enumerate(self.workers):
            self.workers[index] = worker._replace(
                lane=tuple(r._replace(repeated=1) for r in worker.lane if not r.orphan)
            )

    def _expire(self, stream: int) -> None:
        self.left = self.left._replace(streams_expired=self.left.streams_expired - 1)
        self.store[stream] = self.store[stream]._replace(state=0, log=())
        self.note(lambda: f"{STREAMS[stream]} was idle for too long: its state expires")

    def _expire_reply(self, stream: int) -> None:
        self.left = self.left._replace(replies_expired=self.left.replies_expired - 1)
        self.store[stream] = self.store[stream]._replace(reply=0)
        self.note(lambda: f"the reply of {STREAMS[stream]} expires")

    # What clients are told

    def _answer(self, index: int, job: Job, state: int) -> None:
        """A success: it must be in the history that survives, as it is answered."""
        plan = self.book.plan(job)
        slot = self.store[plan.stream]
        self.note(lambda: f"worker {index + 1} answers {self._what(job)} with {self._at(state)}")
        if not isinstance(plan, ChunkPlan):
            return
        uid = self.book.uid(job)
        written = [entry for entry in slot.log if entry[0] == uid]
        if not written:
            raise Broken(
                f"{self._what(job)} is acknowledged, and is not in the history of "
                f"{STREAMS[plan.stream]}"
            )
        if written != [(uid, state)]:
            raise Broken(
                f"{self._what(job)} is answered with the reply of another commit, "
                f"{self._at(state)}; its own made {self._at(written[0][1])}"
            )
        client = self.clients[job.client]
        alone = self.book.scenario.clients[job.client].alone
        if alone or plan.guard is Guard.IF_MATCH:
            lost = self._lost(job, client, slot)
            if lost:
                raise Broken(
                    f"{self._who(job)} goes on with {self._what(job)} and was not told "
                    f"that {lost} is in the history no more"
                )
        known = _with(client.known, job.plan, 1)
        self.clients[job.client] = client._replace(known=known, last=state)

    def _lost(self, job: Job, client: Client, slot: Slot) -> str | None:
        """An earlier chunk that the client relies on and that is in the history no more."""
        uids = {uid for uid, _ in slot.log}
        for plan in range(job.plan):
            uid = self.book.uid(job._replace(plan=plan, number=0))
            if client.known[plan] and uid not in uids:
                return self.book.name(uid)
        return None

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
        mark, facts = self.book.mark(slot.state), error.facts
        if "position" in facts:
            stands = (mark.epoch.hex(), mark.position, mark.tag.hex()) if mark else (None, 0, None)
            if (facts["epoch"], facts["position"], facts["tag"]) != stands:
                raise Broken(
                    f"{error.code} says that {STREAMS[plan.stream]} stands at "
                    f"{facts['position']}, and it is {self._at(slot.state)}"
                )
        uid = self.book.uid(job)
        applied = any(entry[0] == uid for entry in slot.log)
        if error.code in NOT_APPLIED and job.wrote and self._is_there(job, plan, slot):
            raise Broken(f"{self._what(job)} is answered with {error.code}, and it is applied")
        if not isinstance(plan, ChunkPlan):
            return
        if error.code == "already_applied" and not applied:
            raise Broken(f"{self._what(job)} is told to be applied, and is not in the history")
        self._learn(job, plan, error)

    def _is_there(self, job: Job, plan: Any, slot: Slot) -> bool:
        """Whether what an earlier try of the job wrote is in the history."""
        if isinstance(plan, DeletePlan):
            return True
        if isinstance(plan, ChunkPlan):
            return (self.book.uid(job), job.wrote) in slot.log
        mark, wrote = self.book.mark(slot.state), self.book.mark(job.wrote)
        return mark is not None and wrote is not None and mark.epoch == wrote.epoch

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
                slot, uid = self.store[plan.stream], self.book.uid(job)
                if not any(entry[0] == uid for entry in slot.log):
                    raise Broken(
                        f"{self._who(job)}, alone on {STREAMS[plan.stream]}, is told "
                        f"that it is past {self._what(job)}, which it does not hold"
                    )
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
        return self.book.scenario.clients[job.client].name

    def _what(self, job: Job) -> str:
        plan = self.book.plan(job)
        if not isinstance(plan, ChunkPlan):
            return str(plan.name)
        again = " again" if job.number else ""
        if plan.position is None:
            return f"{plan.name} (append)"
        return f"{plan.name} (position {plan.position}){again}"

    def _stream(self, request: Request) -> str:
        return STREAMS[self.book.plan(request.job).stream]

    def _stands(self, request: Request) -> str:
        slot = self.store[self.book.plan(request.job).stream]
        return f"{self._stream(request)}: {self._at(slot.state)}"

    def _at(self, state: int) -> str:
        return describe(self.book, state)


def describe(book: Book, state: int) -> str:
    """A state in words: the events that led to it, position, epoch and tag."""
    mark = book.mark(state)
    if mark is None:
        return "no stream"
    events = "".join(map(str, book.past(state)))
    return f"[{events} @{mark.position}, {book.epochs[mark.epoch]}, tag {mark.tag.hex()[:4]}]"


def _with(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _conflict() -> CarryError:
    return Conflict("moved on by others too often")


def _changed() -> CarryError:
    return StateChanged("not the state that was named")


def _unavailable() -> CarryError:
    return StoreUnavailable("no answer to a read")
