"""Chunks of one live socket: read, started in their order, and answered with frames.

A client's frame is the body of a chunk request with further members: `id`, which is returned with
the outcome, `stream` on a socket for many streams, and `if_match`; the model's reader reads it.
JSON comes in text frames and MessagePack in binary ones. Each frame gets one outcome of its media
type, a reply or an error; `stream_order` has the order of the chunks. At most a window of chunks is
unanswered. While it is full, while a long frame is read, or while the client does not read its
outcomes, no further frame is received (backpressure).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

import structlog
from msgspec.structs import replace
from structlog.contextvars import bound_contextvars
from websockets.frames import CloseCode

from service.access.caller import Caller
from service.codec.frames import Frame, read_envelope
from service.codec.media import Media, dumps
from service.codec.pieces import LONG_VALUES, encode_in_turns
from service.codec.reply_writer import EVERY_STEP, ReplyOptions
from service.core.errors import CarryError, Unauthenticated
from service.core.tracing import RequestSpan
from service.core.values import Chunk, Reply, StreamKey
from service.pipeline.pipeline import EnqueuedChunk
from service.server.websocket_protocol import WebSocketProtocol
from service.telemetry.access_log import (
    CLIENT_DISCONNECTED,
    WEBSOCKET,
    RequestFacts,
    access_log,
    log_request,
)
from service.transports.common.failure_log import as_carry_error, log_failure
from service.transports.common.long_bodies import LONG_BYTES
from service.transports.common.stream_order import PendingChunk, StreamOrder
from service.transports.v1.context import ApiContext
from service.transports.v1.problems import problem

UNAUTHENTICATED: Final = 4401
"""Close code of a socket whose access key is no longer accepted."""

STOPPING: Final = "the service is stopping: connect again, and continue at your position"

T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Entry(PendingChunk):
    """A chunk that has not been answered.

    Attributes:
        deadline_s: when its client stops waiting, on the monotonic clock.
        received_bytes: of its frame.
        chunk: None until the body is read.
        job: the chunk in the pipeline, until it has a result.
        span: that of a chunk that is traced.
        is_recorded: whether its outcome was counted.
        outcome: the frame to send, once it is known.
    """

    stream: str
    media: Media
    deadline_s: float
    received_bytes: int
    frame_id: str | int | None = None
    appends: bool = True
    chunk: Chunk | None = None
    job: EnqueuedChunk | None = None
    span: RequestSpan | None = None
    is_recorded: bool = False
    outcome: bytes | None = None


@dataclass(slots=True, eq=False)
class Session:
    """The chunks of one socket.

    Attributes:
        caller: whose chunks they are.
        stream: the stream of the socket; None if each frame names its own.
        window: most unanswered chunks.
        timeout_s: deadline of each chunk, from the receipt of its frame.
        route: the address of the socket, with the names of its parameters.
        propagated: the headers of the handshake that carry the trace of the caller.
        socket: receives the frames, and sends the outcomes; set by `serve`.
        chunks: number of frames received.
        errors: number of outcomes that are errors.
    """

    api: ApiContext
    caller: Caller
    model: str
    stream: str | None
    window: int
    options: ReplyOptions
    timeout_s: float
    request_id: str
    route: str
    propagated: Mapping[str, str]
    socket: WebSocketProtocol = field(init=False)
    chunks: int = 0
    errors: int = 0
    _order: StreamOrder[Entry] = field(init=False)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _progress: asyncio.Future[None] | None = None

    async def serve(self, socket: WebSocketProtocol) -> None:
        """Answer frames until the client disconnects or the service stops, and close the socket."""
        self._order = StreamOrder(self._begin, self._resolve, self._release, overlaps=True)
        self.socket = socket
        socket.session = self
        self.api.recorder.record_websockets(self.model, 1)
        forget = self.api.access.notify_end(self.caller, self.revoke)
        opened_s = time.monotonic()
        try:
            await self._serve()
        finally:
            self.cancel()
            forget()
            self.api.recorder.record_websockets(self.model, -1)
            self._log_closed(opened_s)

    async def _serve(self) -> None:
        """Receive frames, and at the end answer those that were received."""
        socket = self.socket
        while (message := await socket.receive()) is not None:
            await self._receive(*message)
            if self.unanswered >= self.window:
                await self._wait_until(lambda: self.unanswered < self.window)
            if self._order.is_cleared:
                return
        await self._wait_until(lambda: not self.unanswered)
        code = socket.end_code
        socket.close(code, STOPPING if code == CloseCode.SERVICE_RESTART else "")

    def _log_closed(self, opened_s: float) -> None:
        stream = self.stream and access_log.stream_name(self.stream)
        close = self.socket.conn.close_sent or self.socket.conn.close_rcvd
        log.info(
            "websocket_closed",
            request_id=self.request_id,
            route=self.route,
            code=CloseCode.ABNORMAL_CLOSURE.value if close is None else close.code,
            model=self.model,
            **({} if stream is None else {"stream": stream}),
            chunks=self.chunks,
            errors=self.errors,
            received_bytes=self.socket.received_bytes,
            sent_bytes=self.socket.sent_bytes,
            ms=round((time.monotonic() - opened_s) * 1000, 2),
        )

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for outcomes until a condition is true, or nobody waits for them any more."""
        while not (condition() or self._order.is_cleared):
            self._progress = asyncio.get_running_loop().create_future()
            await self._progress

    def _note_progress(self) -> None:
        if self._progress is not None and not self._progress.done():
            self._progress.set_result(None)
        self.socket.progress += 1

    def _send(self, media: Media, frame: bytes) -> None:
        self.socket.send_now(frame, is_text=media is Media.JSON)

    def revoke(self, error: CarryError) -> None:
        """Close the socket: its access key is no longer accepted, or cannot be checked."""
        self.cancel()
        is_revoked = isinstance(error, Unauthenticated)
        self.socket.close(
            UNAUTHENTICATED if is_revoked else CloseCode.TRY_AGAIN_LATER, error.detail
        )

    @property
    def unanswered(self) -> int:
        """The number of chunks that have not been answered."""
        return self._order.unanswered

    async def _receive(self, body: bytes, is_text: bool) -> None:
        """Start the chunk of a frame, or answer with its error."""
        self.chunks += 1
        media = Media.JSON if is_text else Media.MSGPACK
        deadline_s = time.monotonic() + self.timeout_s
        entry: Entry | None = None
        if self.stream is not None:
            entry = self._order.add(Entry(self.stream, media, deadline_s, len(body)))
        try:
            reader = self.api.codecs[self.model].reader
            self._check_admission(self.stream, deadline_s)
            if len(body) < LONG_BYTES:
                frame = reader.frame(body, media, self.stream)
            else:
                # a separate task, so that a disconnect cancels it, and thereby ends this one
                decode = partial(reader.frame, body, media, self.stream)
                frame = await self._run(self.api.long_bodies.read(len(body), deadline_s, decode))
        except Exception as error:
            frame = Frame(*read_envelope(media, body), as_carry_error(error))
        if entry is None and frame.stream is not None:
            entry = self._order.add(Entry(frame.stream, media, deadline_s, len(body)))
        self._start(entry, frame, media)

    def cancel(self) -> None:
        """Drop the chunks of a client that disconnected, unless they are already in a batch."""
        for task in self._tasks:
            task.cancel()
        for entry in self._order:
            if entry.job is not None:
                self.api.pipeline.cancel(self.caller, entry.job)
            self._record(entry, CLIENT_DISCONNECTED)
        self._order.clear()
        self._note_progress()

    def _check_admission(self, stream: str | None, deadline_s: float) -> None:
        """Reject a chunk that has to wait too long: before its body is read, and again before it
        is queued, since others may have been queued meanwhile.

        Raises:
            Overloaded
        """
        key = None if stream is None else StreamKey(self.model, stream)
        left_s = deadline_s - time.monotonic()
        rejection = self.api.pipeline.check_admission(self.caller, self.model, key, left_s)
        if rejection is not None:
            raise rejection.copy()

    def _start(self, entry: Entry | None, frame: Frame, media: Media) -> None:
        """Start the chunk of a frame when it is its turn, or answer with its error."""
        chunk = frame.result
        if entry is not None:
            entry.frame_id = frame.id
        if isinstance(chunk, CarryError):
            if entry is not None:
                self._resolve(entry, chunk)
            else:
                # without an entry: the frame names no stream
                self._send(media, self._error_frame(media, frame.id, chunk, None))
        elif entry is not None:
            if self.api.tracer is not None:
                began_s = entry.deadline_s - self.timeout_s
                entry.span = self.api.tracer.start_request(self.propagated, began_s)
                chunk = replace(chunk, span=entry.span)
            entry.chunk = chunk
            entry.appends = chunk.position is None
            self._order.set_ready(entry)

    def _begin(self, entry: Entry) -> None:
        """Hand a chunk to the pipeline."""
        if entry.chunk is None:
            raise RuntimeError("a chunk that was not read cannot start")
        on_result = partial(self._on_result, entry)
        try:
            self._check_admission(entry.stream, entry.deadline_s)
            entry.job = self.api.pipeline.enqueue(
                self.caller, entry.chunk, entry.deadline_s, on_result
            )
        except Exception as error:
            self._resolve(entry, as_carry_error(error))

    def _on_result(self, entry: Entry, result: Reply | CarryError) -> None:
        entry.job = None
        if not self._order.is_cleared:
            self._resolve(entry, result)
            self._note_progress()

    def _resolve(self, entry: Entry, result: Reply | CarryError) -> None:
        """Encode an outcome, and send it when it is its turn."""
        if isinstance(result, CarryError):
            if entry.chunk is None or not entry.chunk.dry_run:
                self._order.record_result(entry, failed=True)
            frame = self._error_frame(entry.media, entry.frame_id, result, entry.stream)
            self._record(entry, result.status, len(frame), result)
            self._order.answer(entry, frame)
            return
        if not result.dry_run:
            self._order.record_result(entry, failed=False)
        codec = self.api.codecs[self.model]
        is_short = len(result.outputs) * codec.served.outputs.size <= LONG_VALUES
        outcome = _outcome(entry.frame_id, 200, reply=codec.writer.reply(result, self.options))
        if entry.media is Media.MSGPACK or (is_short and self.options == EVERY_STEP):
            self._answer(entry, dumps(entry.media, outcome))
        else:
            self._run(self._encode_in_turns(entry, outcome))

    async def _encode_in_turns(self, entry: Entry, outcome: Mapping[str, Any]) -> None:
        """Encode a long outcome in JSON, and send it when it is its turn."""
        self._answer(entry, await encode_in_turns(outcome))
        self._note_progress()

    def _answer(self, entry: Entry, frame: bytes) -> None:
        """Send an encoded outcome when it is its turn."""
        self._record(entry, 200, len(frame))
        self._order.answer(entry, frame)

    def _record(
        self, entry: Entry, status: int, sent_bytes: int = 0, error: CarryError | None = None
    ) -> None:
        """Count an outcome, once, and end its span; only an error has a line in the log."""
        if entry.is_recorded:
            return
        entry.is_recorded = True
        received_s = entry.deadline_s - self.timeout_s
        log_request(
            self.request_id,
            WEBSOCKET,
            self.route,
            status,
            round((time.monotonic() - received_s) * 100_000) / 100,
            RequestFacts(
                self.model,
                entry.stream,
                None if error is None else error.code,
                self.caller.key_id,
                None if error is None else error.reason,
                entry.received_bytes,
                sent_bytes,
                entry.span,
            ),
            has_line=error is not None,
        )

    def _release(self, entry: Entry) -> None:
        self._send(entry.media, entry.outcome or b"")

    def _error_frame(
        self, media: Media, frame_id: str | int | None, error: CarryError, stream: str | None
    ) -> bytes:
        self.errors += 1
        self.api.recorder.record_error(self.model, error)
        with bound_contextvars(request_id=self.request_id):
            log_failure(error)
            document: dict[str, Any] = {**problem(error)}
        if stream is not None:
            document.setdefault("stream", stream)
        return dumps(media, _outcome(frame_id, document["status"], error=document))

    def _run(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _outcome(frame_id: str | int | None, status: int, **document: Any) -> dict[str, Any]:
    """The outcome of a chunk: v1's reply, or its problem document."""
    members = {"status": status, **document}
    return members if frame_id is None else {"id": frame_id, **members}
