"""Chunks of one live socket: read, started in their order, and answered with frames.

Each frame gets one outcome, a reply or an error; `stream_order` has the order of the chunks. At
most a window of chunks is unanswered. While it is full, while a long frame is read, or while the
client does not read its outcomes, no further frame is received (backpressure).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Final

import structlog
from msgspec.structs import replace
from structlog.contextvars import bound_contextvars
from websockets.frames import CloseCode

from service.access.caller import Caller
from service.codec.frames import Frame, read_envelope
from service.codec.media import Media, dumps
from service.codec.pieces import LONG_VALUES, encode_pieces
from service.codec.reply_writer import EVERY_STEP, ReplyOptions
from service.core.errors import CarryError, Unauthenticated
from service.core.tracing import RequestSpan
from service.core.values import Chunk, Reply, StreamKey
from service.pipeline.pipeline import EnqueuedChunk
from service.server.websocket_protocol import STOPPING, WebSocketProtocol
from service.telemetry.access_log import (
    CLIENT_DISCONNECTED,
    WEBSOCKET,
    RequestFacts,
    access_log,
    log_request,
)
from service.transports.common.failure_log import log_failure, log_unexpected_failure
from service.transports.common.long_bodies import LONG_BYTES
from service.transports.common.stream_order import PendingChunk, StreamOrder
from service.transports.live.frames import FrameId, error_outcome, reply_outcome
from service.transports.v1.context import ApiContext, ModelCodec
from service.transports.v1.problems import status_of

UNAUTHENTICATED: Final = 4401
"""Close code of a socket whose access key is no longer accepted."""


log = structlog.get_logger(__name__)


class Entry(PendingChunk):
    """A chunk that has not been answered.

    Attributes:
        deadline_s: when its client stops waiting, on the monotonic clock.
        chunk: None until the body is read.
        job: the chunk in the pipeline, until it has a result.
        span: that of a chunk that is traced.
        is_recorded: whether its outcome was counted.
        outcome: the frame to send, once it is known.
    """

    __slots__ = (
        "chunk",
        "deadline_s",
        "frame_id",
        "is_recorded",
        "job",
        "media",
        "received_bytes",
        "span",
    )

    outcome: bytes | None

    def __init__(
        self,
        frame_id: FrameId | None,
        media: Media,
        stream: str,
        deadline_s: float,
        received_bytes: int,
    ):
        super().__init__(stream)
        self.received_bytes = received_bytes
        self.frame_id = frame_id
        self.media = media
        self.deadline_s = deadline_s
        self.chunk: Chunk | None = None
        self.job: EnqueuedChunk | None = None
        self.span: RequestSpan | None = None
        self.is_recorded = False


class Session:
    """The chunks of one socket.

    Args:
        caller: whose chunks they are.
        stream: the stream of the socket; None if each frame names its own.
        window: most unanswered chunks.
        socket: receives the frames, and sends the outcomes.
        timeout_s: deadline of each chunk, from the receipt of its frame.
        route: the address of the socket, with the names of its parameters.
        propagated: the headers of the handshake that carry the trace of the caller.

    Attributes:
        chunks: number of frames received.
    """

    def __init__(
        self,
        api: ApiContext,
        caller: Caller,
        model: str,
        stream: str | None,
        window: int,
        socket: WebSocketProtocol,
        *,
        options: ReplyOptions,
        timeout_s: float,
        request_id: str,
        route: str,
        propagated: Mapping[str, str],
    ):
        self._api = api
        self._caller = caller
        self._pipeline = api.pipeline
        self._model = model
        self._stream = stream
        self._options = options
        self._timeout_s = timeout_s
        self._request_id = request_id
        self._route = route
        self._propagated = propagated
        self._socket = socket
        self._window = window
        self._forget = api.access.notify_end(caller, self.revoke)
        api.recorder.record_websockets(model, 1)
        self._order: StreamOrder[Entry] = StreamOrder(
            self._begin, self._resolve, self._release, overlaps=True
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._progress: asyncio.Future[None] | None = None
        self.chunks = 0
        self._errors = 0
        socket.session = self

    async def serve(self) -> None:
        """Answer frames until the client disconnects or the service stops, and close the socket."""
        opened_s = time.monotonic()
        try:
            await self._serve()
        finally:
            self.cancel()
            self._forget()
            self._api.recorder.record_websockets(self._model, -1)
            self._log_closed(opened_s)

    async def _serve(self) -> None:
        """Receive frames, and at the end answer those that were received."""
        while (event := await self._socket.receive())["type"] == "websocket.receive":
            text = event.get("text")
            if text is None:
                await self._receive(Media.MSGPACK, event["bytes"])
            else:
                await self._receive(Media.JSON, text.encode())
            await self._wait_until(lambda: self.unanswered < self._window)
            await self._socket.writable.wait()
            if self._order.is_cleared:
                return
        await self._wait_until(lambda: not self.unanswered)
        code = event.get("code")
        self._socket.close(code, STOPPING if code == CloseCode.SERVICE_RESTART else "")

    def _log_closed(self, opened_s: float) -> None:
        stream = self._stream and access_log.named(self._stream)
        close = self._socket.conn.close_sent or self._socket.conn.close_rcvd
        log.info(
            "websocket_closed",
            request_id=self._request_id,
            route=self._route,
            code=CloseCode.ABNORMAL_CLOSURE.value if close is None else close.code,
            model=self._model,
            **({} if stream is None else {"stream": stream}),
            chunks=self.chunks,
            errors=self._errors,
            received_bytes=self._socket.received_bytes,
            sent_bytes=self._socket.sent_bytes,
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
        self._socket.progress += 1

    def _send(self, media: Media, frame: bytes) -> None:
        self._socket.send_now(frame, is_text=media is Media.JSON)

    def revoke(self, error: CarryError) -> None:
        """Close the socket: its access key is no longer accepted, or cannot be checked."""
        self.cancel()
        is_revoked = isinstance(error, Unauthenticated)
        self._socket.close(
            UNAUTHENTICATED if is_revoked else CloseCode.TRY_AGAIN_LATER, error.detail
        )

    @property
    def unanswered(self) -> int:
        """The number of chunks that have not been answered."""
        return self._order.unanswered

    async def _receive(self, media: Media, data: bytes) -> None:
        """Start the chunk of a frame, or answer with its error."""
        self.chunks += 1
        deadline_s = time.monotonic() + self._timeout_s
        entry: Entry | None = None
        if self._stream is not None:
            entry = self._order.add(Entry(None, media, self._stream, deadline_s, len(data)))
        codec: ModelCodec | None = None
        body = bytes(data)
        try:
            codec = self._api.codecs[self._model]
            self._check_admission(self._stream, deadline_s)
            if len(body) >= LONG_BYTES:
                # a task of its own, so that a disconnect ends it
                reading = self._run(self._read_long(codec, entry, media, body, deadline_s))
                await asyncio.wait([reading])
                return
            frame = codec.reader.frame(body, media, self._stream)
            self._start(entry, media, frame, deadline_s, body)
        except CarryError as error:
            self._reject(entry, media, codec, body, deadline_s, error)
        except Exception as error:
            self._reject(entry, media, codec, body, deadline_s, log_unexpected_failure(error))

    def cancel(self) -> None:
        """Drop the chunks of a client that disconnected, unless they are already in a batch."""
        for task in self._tasks:
            task.cancel()
        for entry in self._order:
            if entry.job is not None:
                self._pipeline.cancel(self._caller, entry.job)
            self._record(entry, CLIENT_DISCONNECTED)
        self._order.clear()
        self._note_progress()

    def _check_admission(self, stream: str | None, deadline_s: float) -> None:
        """Reject a chunk that has to wait too long: before its body is read, and again before it
        is queued, since others may have been queued meanwhile.

        Raises:
            Overloaded
        """
        key = None if stream is None else StreamKey(self._model, stream)
        left_s = deadline_s - time.monotonic()
        rejection = self._pipeline.check_admission(self._caller, self._model, key, left_s)
        if rejection is not None:
            raise rejection.copy()

    async def _read_long(
        self,
        codec: ModelCodec,
        entry: Entry | None,
        media: Media,
        body: bytes,
        deadline_s: float,
    ) -> None:
        """Read a long frame when it is its turn, and start its chunk."""
        try:
            frame = await self._api.long_bodies.read(
                len(body), deadline_s, partial(codec.reader.frame, body, media, self._stream)
            )
            self._start(entry, media, frame, deadline_s, body)
        except CarryError as error:
            self._reject(entry, media, codec, body, deadline_s, error)
        except Exception as error:
            self._reject(entry, media, codec, body, deadline_s, log_unexpected_failure(error))

    def _start(
        self, entry: Entry | None, media: Media, frame: Frame, deadline_s: float, body: bytes
    ) -> None:
        """Start the chunk of a frame when it is its turn, or answer with its error."""
        if entry is None and frame.stream is not None:
            entry = self._order.add(Entry(frame.id, media, frame.stream, deadline_s, len(body)))
        result = frame.result
        if entry is not None:
            entry.frame_id = frame.id
        if not isinstance(result, CarryError):
            if entry is not None:
                self._start_in_order(entry, result)
        elif entry is None:
            # nothing says which stream it is for
            self._send(media, self._error_frame(media, frame.id, result, None))
        else:
            self._resolve(entry, result)

    def _start_in_order(self, entry: Entry, chunk: Chunk) -> None:
        if self._api.tracer is not None:
            began_s = entry.deadline_s - self._timeout_s
            entry.span = self._api.tracer.start_request(self._propagated, began_s)
            chunk = replace(chunk, span=entry.span)
        entry.chunk = chunk
        entry.appends = chunk.position is None
        self._order.set_ready(entry)

    def _begin(self, entry: Entry) -> None:
        """Hand a chunk to the pipeline."""
        if entry.chunk is None:
            raise RuntimeError("a chunk that was not read cannot start")
        try:
            self._check_admission(entry.stream, entry.deadline_s)
        except CarryError as error:
            self._resolve(entry, error)
            return
        on_result = partial(self._on_result, entry)
        entry.job = self._pipeline.enqueue(self._caller, entry.chunk, entry.deadline_s, on_result)

    def _on_result(self, entry: Entry, result: Reply | CarryError) -> None:
        entry.job = None
        if not self._order.is_cleared:
            self._resolve(entry, result)
            self._note_progress()

    def _reject(
        self,
        entry: Entry | None,
        media: Media,
        codec: ModelCodec | None,
        body: bytes,
        deadline_s: float,
        error: CarryError,
    ) -> None:
        """Answer a frame that was not read."""
        frame_id, stream = (None, None) if codec is None else read_envelope(media, body)
        self._start(entry, media, Frame(frame_id, stream, error), deadline_s, body)

    def _resolve(self, entry: Entry, result: Reply | CarryError) -> None:
        """Encode an outcome, and send it when it is its turn."""
        if isinstance(result, CarryError):
            if entry.chunk is None or not entry.chunk.dry_run:
                self._order.record_result(entry, failed=True)
            frame = self._error_frame(entry.media, entry.frame_id, result, entry.stream)
            self._record(entry, status_of(result), len(frame), result)
            self._order.answer(entry, frame)
            return
        if not result.dry_run:
            self._order.record_result(entry, failed=False)
        codec = self._api.codecs[self._model]
        is_short = len(result.outputs) * codec.served.outputs.size <= LONG_VALUES[entry.media]
        outcome = reply_outcome(entry.frame_id, codec.writer.reply(result, self._options))
        if is_short and self._options == EVERY_STEP:
            self._answer(entry, dumps(entry.media, outcome))
        else:
            self._run(self._write_in_pieces(entry, outcome))

    async def _write_in_pieces(self, entry: Entry, outcome: Mapping[str, Any]) -> None:
        """Encode an outcome in pieces, while the event loop runs."""
        pieces = []
        for piece in encode_pieces(entry.media, outcome):
            pieces.append(piece)
            await asyncio.sleep(0)
        self._answer(entry, b"".join(pieces))
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
        received_s = entry.deadline_s - self._timeout_s
        log_request(
            self._request_id,
            WEBSOCKET,
            self._route,
            status,
            round((time.monotonic() - received_s) * 100_000) / 100,
            RequestFacts(
                self._model,
                entry.stream,
                None if error is None else error.code,
                self._caller.key_id,
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
        self, media: Media, frame_id: FrameId | None, error: CarryError, stream: str | None
    ) -> bytes:
        self._errors += 1
        self._api.recorder.record_error(self._model, error)
        with bound_contextvars(request_id=self._request_id):
            log_failure(error)
            return dumps(media, error_outcome(frame_id, error, stream))

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
