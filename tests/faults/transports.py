"""Transports: the ways by which a client sends a chunk to a worker.

Each is a class with `send` and `close`, and an entry of `TRANSPORTS`; every attempt of a client
draws one of those that the run allows. `send` returns the members of version 1's reply (epoch, tag,
position, outputs, replayed), whatever form they have on the wire, or raises `Problem`: of status 0
where the request may or may not have been carried out, otherwise with version 1's code; its
document holds the stream's head where it is named. `Traffic.begins_chunk` has to recognize the
requests.
"""

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import chain
from typing import Any, Final, NamedTuple, TypeVar

import grpc
import msgpack
import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus, WebSocketException

from carry_client import (
    AsyncCarry,
    Encoding,
    NoAnswer,
    Problem,
    encode_body,
    read_problem,
    read_response,
    stream_path,
)
from tests.faults.history import NO_HEAD, Chunk, Head, Reply
from tests.faults.network import MODEL, OUTPUT
from tests.support.v2_messages import callable_of, infer_request, read_outputs

TIMEOUT_S: Final = 2.5
_REJECTIONS: Final = frozenset(
    {"position_ahead", "position_behind", "already_applied", "state_changed", "epoch_mismatch"}
)
_CHANNEL: Final = {
    "grpc.use_local_subchannel_pool": 1,
    "grpc.enable_retries": 0,
    "grpc.enable_http_proxy": 0,
    "grpc.max_reconnect_backoff_ms": 100,
}
Members = Mapping[str, Any]
T = TypeVar("T")


class Conditions(NamedTuple):
    """What an attempt sends beside the chunk. A transport without If-Match ignores the ETag."""

    epoch: str | None = None
    etag: str | None = None
    deadline_s: float | None = None  # within which the service has to answer

    def members(self, chunk: Chunk, **more: Any) -> dict[str, Any]:
        """Members of a body: position and epoch, and those that are not None of `more`."""
        members = {"position": chunk.start, "epoch": self.epoch, **more}
        return {name: value for name, value in members.items() if value is not None}

    def headers(self) -> dict[str, str]:
        """HTTP headers, without the ETag."""
        seconds = self.deadline_s
        return {} if seconds is None else {"carry-timeout": f"{seconds:.3f}"}


ALWAYS: Final = Conditions()


class V1:
    """Version 1 of the HTTP API."""

    def __init__(self, url: str, encoding: Encoding = "json"):
        self._carry, self._encoding = AsyncCarry(url, encoding=encoding), encoding
        self.close = self._carry.close

    async def send(self, chunk: Chunk, conditions: Conditions) -> Members:
        path = stream_path(MODEL, chunk.stream)
        body = conditions.members(chunk, inputs=_v1_inputs(chunk, self._encoding))
        headers = conditions.headers()
        if conditions.etag is not None:
            headers["if-match"] = f'"{conditions.etag}"'
        reply: Members = await self._carry.request("POST", f"{path}/chunks", body, headers=headers)
        return reply


class V2:
    """KServe's V2 protocol over HTTP: a stream is a sequence. Replies are JSON."""

    def __init__(self, url: str, *, is_binary: bool = False):
        self._carry, self._is_binary = AsyncCarry(url, encoding="json"), is_binary
        self.close = self._carry.close

    async def send(self, chunk: Chunk, conditions: Conditions) -> Members:
        rows, headers = chunk.rows.astype("<f4"), conditions.headers()
        tensor: dict[str, Any] = {"name": "inputs", "datatype": "FP32", "shape": rows.shape}
        if self._is_binary:
            tensor["parameters"] = {"binary_data_size": rows.nbytes}
        else:
            tensor["data"] = rows.ravel().tolist()
        parameters = conditions.members(chunk, sequence_id=chunk.stream)
        body = encode_body("json", {"parameters": parameters, "inputs": [tensor]})
        if self._is_binary:
            headers["inference-header-content-length"] = str(len(body))
            body += rows.tobytes()
        path = f"/v2/models/{MODEL}/infer"
        reply = await self._carry.request("POST", path, body, headers=headers)
        [output] = reply["outputs"]
        outputs = np.reshape(output["data"], output["shape"])
        return {**reply["parameters"], "outputs": {output["name"]: outputs}}


class ConnectionPool:
    """Pool of connections, each used for one request at a time."""

    open: Callable[[str], Awaitable[Any]]
    drop: Callable[[Any], Awaitable[None]]

    def __init__(self) -> None:
        self._idle: dict[str, list[Any]] = defaultdict(list)

    @asynccontextmanager
    async def acquire(self, key: str, *, is_kept: bool = True) -> AsyncIterator[Any]:
        """Acquire a connection for one request; a shared one could confuse the outcomes of two."""
        idle = self._idle[key] if is_kept else []
        connection, is_answered = idle.pop() if idle else await self.open(key), False
        try:
            yield connection
            is_answered = True
        except Problem as problem:
            is_answered = problem.status > 0
            raise
        finally:
            if is_kept and is_answered:
                idle.append(connection)
            else:
                await self.drop(connection)

    async def close(self) -> None:
        for connection in chain.from_iterable(self._idle.values()):
            await self.drop(connection)


class LiveSockets(ConnectionPool):
    """Version 1 over WebSocket: a socket for a stream, kept while its chunks are answered.

    A deadline belongs to a socket, so an attempt with one has a socket of its own.
    """

    def __init__(self, url: str, encoding: Encoding = "msgpack"):
        super().__init__()
        self._url, self._encoding = url.replace("http", "ws", 1), encoding

    async def send(self, chunk: Chunk, conditions: Conditions) -> Members:
        inputs = _v1_inputs(chunk, self._encoding)
        members = conditions.members(chunk, inputs=inputs, if_match=conditions.etag)
        frame = encode_body(self._encoding, members)
        deadline_s = conditions.deadline_s
        path = f"{stream_path(MODEL, chunk.stream)}/live"
        path += "" if deadline_s is None else f"?timeout_s={deadline_s:.3f}"
        is_kept = deadline_s is None and chunk.start is not None
        try:
            async with self.acquire(path, is_kept=is_kept) as socket:
                await socket.send(frame, text=self._encoding == "json")
                answer = await socket.recv(decode=False)
                outcome = json.loads(answer) if answer[:1] == b"{" else msgpack.unpackb(answer)
                if "error" in outcome:
                    raise read_problem(outcome["status"], outcome["error"])
                reply: Members = outcome["reply"]
                return reply
        except InvalidStatus as error:
            read_response(error.response.status_code, "application/json", error.response.body)
            raise
        except (OSError, EOFError, WebSocketException) as error:
            raise NoAnswer(error) from error

    async def open(self, key: str) -> ClientConnection:
        socket = await connect(
            f"{self._url}{key}",
            open_timeout=60,
            ping_interval=None,
            compression=None,
            proxy=None,
        )
        try:
            # the hello
            await socket.recv()
        except BaseException:
            await self.drop(socket)
            raise
        return socket

    async def drop(self, connection: ClientConnection) -> None:
        connection.transport.abort()


class Grpc(ConnectionPool):
    """KServe's V2 protocol over gRPC: one call for each chunk. A channel is one connection."""

    def __init__(self, url: str):
        super().__init__()
        self._address = url.removeprefix("http://")

    async def send(self, chunk: Chunk, conditions: Conditions) -> Members:
        members = conditions.members(chunk)
        request = infer_request(MODEL, chunk.rows, chunk.stream, **members)
        async with self.acquire("") as channel:
            try:
                reply = await self.infer(channel, request, conditions.deadline_s)
            except grpc.aio.AioRpcError as error:
                document = dict(error.trailing_metadata()).get("carry-problem-bin")
                raise NoAnswer(error) if document is None else _read_problem(document) from error
        members = {
            name: getattr(value, value.WhichOneof("parameter_choice"))
            for name, value in reply.parameters.items()
        }
        return {**members, "outputs": read_outputs(reply)}

    async def infer(self, channel: Any, request: Any, timeout_s: float | None) -> Any:
        """Make the call."""
        return await callable_of(channel, "ModelInfer")(request, timeout=timeout_s)

    async def open(self, key: str) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self._address, tuple(_CHANNEL.items()))

    async def drop(self, connection: grpc.aio.Channel) -> None:
        await connection.close()


class GrpcStream(Grpc):
    """V2 over gRPC by a call with a stream of requests."""

    async def infer(self, channel: Any, request: Any, timeout_s: float | None) -> Any:
        call = callable_of(channel, "ModelStreamInfer")(iter([request]), timeout=timeout_s)
        [answer] = [each async for each in call]
        if answer.error_message:
            raise _read_problem(answer.infer_response.parameters["carry_problem"].string_param)
        return answer.infer_response


def _v1_inputs(chunk: Chunk, encoding: Encoding) -> Any:
    return chunk.rows.tolist() if encoding == "json" else chunk.rows.astype("<f4").tobytes()


def _read_problem(document: str | bytes) -> Problem:
    problem = json.loads(document)
    return read_problem(problem["status"], problem)


TRANSPORTS: Final[dict[str, Callable[[str], Any]]] = {
    "json": V1,
    "msgpack": partial(V1, encoding="msgpack"),
    "v2": V2,
    "v2-binary": partial(V2, is_binary=True),
    "websocket": LiveSockets,
    "websocket-json": partial(LiveSockets, encoding="json"),
    "grpc": Grpc,
    "grpc-stream": GrpcStream,
}


class WorkerClient:
    """One worker: chunks by any transport, streams by version 1. Every request is sent once, and
    fails unless it is answered in time. Those whose names begin with `grpc` use the second URL.
    """

    def __init__(self, name: str, urls: Sequence[str], transports: Sequence[str]):
        self._name = name
        self._carry = AsyncCarry(urls[0], encoding="json")
        self._transports = [TRANSPORTS[each](urls[each.startswith("grpc")]) for each in transports]

    async def send(
        self, chunk: Chunk, conditions: Conditions, random: np.random.Generator
    ) -> Reply:
        """Send a chunk by one of the transports: an acknowledgement, or a rejection that names the
        stream's head. Raises every other problem."""
        transport = self._transports[random.integers(len(self._transports))]
        sent_s, code, outputs = time.monotonic(), "", None
        try:
            members = await self._in_time(transport.send(chunk, conditions))
            outputs = np.asarray(members["outputs"][OUTPUT], np.float32)
        except Problem as problem:
            if problem.code not in _REJECTIONS:
                raise
            members, code = problem.document, problem.code
        answered_s, replayed = time.monotonic(), bool(members.get("replayed"))
        # version 2 names only another version than the champion
        version = members.get("version", members.get("carry_version"))
        head, answered = _read_head(members), (version, _read_warmth(members))
        return Reply(
            *head, chunk, self._name, sent_s, answered_s, outputs, replayed, code, *answered
        )

    async def read_head(self, stream: str) -> Head:
        """The stream's head."""
        try:
            request = self._carry.request("GET", stream_path(MODEL, stream))
            return Head(*_read_head(await self._in_time(request)))
        except Problem as problem:
            if problem.status == 404:
                return NO_HEAD
            raise

    async def delete(self, stream: str, etag: str | None) -> None:
        """Delete a stream."""
        headers = {} if etag is None else {"if-match": f'"{etag}"'}
        path = stream_path(MODEL, stream)
        await self._in_time(self._carry.request("DELETE", path, headers=headers))

    async def request(self, method: str, path: str, body: object = None) -> Members:
        """Any other request of version 1."""
        return await self._in_time(self._carry.request(method, path, body))

    async def close(self) -> None:
        await asyncio.gather(*(each.close() for each in (self._carry, *self._transports)))

    async def _in_time(self, request: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await request
        except TimeoutError as error:
            raise NoAnswer(error) from error


def _read_warmth(members: Members) -> tuple[int, int] | None:
    """How warm the state was before the chunk; None if it was warm."""
    if "carry_warm" in members:
        events, _, of = members["carry_warm"].partition("/")
        return int(events), int(of)
    warm = members.get("warm")
    return None if warm is None else (warm["events"], warm["of"])


def _read_head(members: Members) -> tuple[str | None, bytes | None, int]:
    """Epoch, tag and position of a document that names a stream's head."""
    tag = members.get("tag")
    return members.get("epoch"), tag and bytes.fromhex(tag), members.get("position") or 0
