"""Fault steps of the model.

If a request is carried out but its answer is lost, the request is repeated (`lose`), abandoned
(`timeout`) or its worker dies (`crash`). Bytes in transit on a broken connection are lost with it,
or arrive at any later step (`deliver`).
"""

from __future__ import annotations

from service.core.errors import CarryError, StoreUnavailable
from tests.protocol.step import Step
from tests.protocol.world import STREAMS, WRITES, Kind, Request, Worker


class FaultyStep(Step):
    """A move of the workers or the clients, or a fault."""

    def _lose(self, index: int, cut: int, held: int) -> None:
        """Break the connection after `cut` requests were carried out, without an answer, and
        repeat all pending requests. `held`: the bytes are still in transit."""
        self.left = self.left._replace(replies_lost=self.left.replies_lost - 1)
        self.note(
            lambda: (
                f"the connection of worker {index + 1} breaks"
                + (f", after {cut} of its requests were carried out" if cut else "")
                + (", with its requests on their way" if held else "")
            )
        )
        self._cut(index, cut, held)
        worker = self.workers[index]
        self.workers[index] = worker._replace(lane=self._repeated(worker.lane))

    def _repeated(self, lane: tuple[Request, ...]) -> tuple[Request, ...]:
        """The requests that are repeated on a new connection: pending ones, and earlier writes to
        the same streams, which could otherwise arrive late and make a pending one succeed."""
        forget, awaited = self.book.rules.forget_abandoned, set[int]()
        repeated: list[Request] = []
        for request in reversed(lane):
            stream = self.book.plan(request.job).stream
            if not request.orphan or (stream in awaited and not forget):
                repeated.insert(0, request._replace(repeated=1))
                awaited.update((stream,) * (request.kind in WRITES))
        return tuple(repeated)

    def _cut(self, index: int, cut: int, held: int) -> None:
        for place in range(cut):
            self._write_unseen(self.workers[index].lane[place])
        if held:
            self.left = self.left._replace(bytes_held=self.left.bytes_held - 1)
            self.held.append(tuple(r for r in self.workers[index].lane if r.kind in WRITES))

    def _write_unseen(self, request: Request) -> None:
        """Run a script whose answer is lost; the request may be repeated."""
        if self._write(request):
            job = request.job._replace(wrote=request.new or -1)
            self._mark(lambda r: r.job[:3] == job[:3], job=job)

    def _deliver(self, place: int) -> None:
        """Deliver the first request that is in transit on a given-up connection."""
        request, *rest = self.held.pop(place)
        if rest:
            self.held.append(tuple(rest))
        self.note(lambda: "bytes of the connection that was given up arrive")
        self._write_unseen(request)

    def _crash(self, index: int, cut: int, held: int) -> None:
        self.left = self.left._replace(crashes=self.left.crashes - 1)
        self.note(
            lambda: (
                f"worker {index + 1} is killed"
                + (f", after {cut} of its requests were carried out" if cut else "")
                + (", with its requests on their way" if held else "")
            )
        )
        self._cut(index, cut, held)
        self.workers[index] = Worker((0,) * len(STREAMS))

    def _timeout(self, index: int) -> None:
        """Cancel the oldest pending request; it may still be carried out."""
        self.left = self.left._replace(timeouts=self.left.timeouts - 1)
        worker = self.workers[index]
        place = next(i for i, request in enumerate(worker.lane) if not request.orphan)
        request = worker.lane[place]
        stream = self.book.plan(request.job).stream
        self.note(lambda: f"worker {index + 1} waited long enough for {self._what(request.job)}")
        writes = request.kind in WRITES
        error = self.book.rules.unanswered(STREAMS[stream]) if writes else _unavailable()
        left = (request,) if writes else ()
        lane = (*worker.lane[:place], *left, *worker.lane[place + 1 :])
        self.workers[index] = worker._replace(lane=lane)
        if request.kind == Kind.COMMIT:
            self._drop(index, stream)
        self._tell(index, request.job, error)
        self._start(index, stream)

    def _rollback(self, place: int) -> None:
        """Roll the store back to an earlier state; all connections break."""
        self.left = self.left._replace(rollbacks=self.left.rollbacks - 1)
        self.store = list(self.older[place])
        self.older = self.older[: place + 1]
        self.held = []
        self.note(lambda: "the store is stopped and started on what it held before")
        for index, worker in enumerate(self.workers):
            lane = tuple(request._replace(stale=0) for request in self._repeated(worker.lane))
            self.workers[index] = worker._replace(lane=lane)

    def _expire(self, stream: int) -> None:
        self.left = self.left._replace(streams_expired=self.left.streams_expired - 1)
        self.store[stream] = self.store[stream]._replace(state=0, log=())
        self.note(lambda: f"{STREAMS[stream]} was idle for too long: its state expires")

    def _expire_reply(self, stream: int) -> None:
        self.left = self.left._replace(replies_expired=self.left.replies_expired - 1)
        self.store[stream] = self.store[stream]._replace(reply=0)
        self.note(lambda: f"the reply of {STREAMS[stream]} expires")


def _unavailable() -> CarryError:
    return StoreUnavailable("no answer to a read")
