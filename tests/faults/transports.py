"""Transports: the ways by which a client sends a chunk to a worker.

Each is a class with `send` and `close`, and an entry of `TRANSPORTS`; every attempt of a client
draws one of those that the run allows. `Traffic.begins_chunk` has to recognize its requests, so
that the stage of their chunks is known when a worker is killed.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import grpc
import msgpack
import numpy as np
from tritonclient.grpc.service_pb2 import ModelInferRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus, WebSocketException

from carry_client import (
    AsyncCarry,
    Encoding,
    NoAnswer,
    Problem,
    encode_body,
    errors,
    read_response,
    stream_path,
)
from tests.faults.history import NO_HEAD, Chunk, Head, Reply
from tests.faults.network import MODEL, OUTPUT

TIMEOUT_S: Final = 2.5
STREAM_HEADER: Final = "chunk-of-stream"
"""Names the stream to the proxies, where the address does not; the service ignores it."""
_REJECTIONS: Final = frozenset(
    {"position_ahead", "position_behind", "already_applied", "state_changed", "epoch_mismatch"}
)
Members = Mapping[str, Any]
T = TypeVar("T")
GRPC: Final = "grpc"


class Conditions(NamedTuple):
    """What an attempt sends beside the chunk. A transport without If-Match ignores the ETag.

    Attributes:
        deadline_s: within which the service has to answer.
    """

    epoch: str | None = None
    etag: str | None = None
    deadline_s: float | None = None

    def headers(self, **more: str) -> dict[str, str]:
        """Headers of HTTP, without the ETag."""
        seconds = self.deadline_s
        return more if seconds is None else {**more, "carry-timeout": f"{seconds:.3f}"}


ALWAYS: Final = Conditions()


class Transport(Protocol):
    """Sends chunks to one worker."""

    async def send(self, chunk: Chunk, conditions: Conditions = ALWAYS) -> Members:
        """The members of version 1's reply (epoch, tag, position, outputs, replayed), whatever form
        they have on the wire.

        Raises:
            Problem: of status 0 where the request may or may not have been carried out, otherwise
                with version 1's code; the document holds the stream's head where it is named.
        """

    async def close(self) -> None:
        """Close the connections."""


class V1:
    """Version 1 of the HTTP API."""

    def __init__(self, url: str, encoding: Encoding = "json"):
        self._carry, self._encoding = AsyncCarry(url, encoding=encoding), encoding
        self.close = self._carry.close

    async def send(self, chunk: Chunk, conditions: Conditions = ALWAYS) -> Members:
        tag = {} if conditions.etag is None else {"if-match": f'"{conditions.etag}"'}
        body, path = v1_body(chunk, conditions, self._encoding), stream_path(MODEL, chunk.stream)
        headers = conditions.headers(**tag)
        reply: Members = await self._carry.request("POST", f"{path}/chunks", body, headers=headers)
        return reply


class V2:
    """KServe's V2 protocol over HTTP: a stream is a sequence. Replies are JSON."""

    def __init__(self, url: str, *, is_binary: bool = False):
        self._carry, self._is_binary = AsyncCarry(url, encoding="json"), is_binary
        self.close = self._carry.close

    async def send(self, chunk: Chunk, conditions: Conditions = ALWAYS) -> Members:
        rows, headers = (
            chunk.rows.astype("<f4"),
            conditions.headers(**{STREAM_HEADER: chunk.stream}),
        )
        tensor: dict[str, Any] = {"name": "inputs", "datatype": "FP32", "shape": rows.shape}
        if self._is_binary:
            tensor["parameters"] = {"binary_data_size": rows.nbytes}
        else:
            tensor["data"] = rows.ravel().tolist()
        parameters = {
            "sequence_id": chunk.stream,
            "position": chunk.start,
            "epoch": conditions.epoch,
        }
        body = encode_body("json", {"parameters": without_none(parameters), "inputs": [tensor]})
        if self._is_binary:
            headers["inference-header-content-length"] = str(len(body))
            body += rows.tobytes()
        path = f"/v2/models/{MODEL}/infer"
        reply = await self._carry.request("POST", path, body, headers=headers)
        [output] = reply["outputs"]
        outputs = np.reshape(output["data"], output["shape"])
        return {**reply["parameters"], "outputs": {output["name"]: outputs}}


class LiveSockets:
    """Version 1 over WebSocket: a socket for a stream, kept while its chunks are answered.

    A deadline belongs to a socket, so an attempt with one has a socket of its own.
    """

    def __init__(self, url: str, encoding: Encoding = "msgpack"):
        self._url, self._encoding = url.replace("http", "ws", 1), encoding
        self._idle: dict[str, list[ClientConnection]] = defaultdict(list)

    async def send(self, chunk: Chunk, conditions: Conditions = ALWAYS) -> Members:
        etag = without_none({"if_match": conditions.etag})
        frame = encode_body(self._encoding, v1_body(chunk, conditions, self._encoding) | etag)
        is_kept = conditions.deadline_s is None and chunk.start is not None
        idle, outcome = self._idle[chunk.stream] if is_kept else [], None
        try:
            socket = idle.pop() if idle else await self._open(chunk.stream, conditions.deadline_s)
            try:
                await socket.send(frame, text=self._encoding == "json")
                answer = await socket.recv(decode=False)
                outcome = json.loads(answer) if answer[:1] == b"{" else msgpack.unpackb(answer)
            finally:
                if is_kept and outcome is not None:
                    idle.append(socket)
                else:
                    # its outcome would be taken for another's
                    socket.transport.abort()
        except InvalidStatus as error:
            read_response(error.response.status_code, "application/json", error.response.body)
            raise
        except (OSError, EOFError, WebSocketException) as error:
            raise NoAnswer(error) from error
        if "error" in outcome:
            raise errors.read_problem(outcome["status"], outcome["error"])
        reply: Members = outcome["reply"]
        return reply

    async def close(self) -> None:
        for socket in chain.from_iterable(self._idle.values()):
            await socket.close()

    async def _open(self, stream: str, deadline_s: float | None) -> ClientConnection:
        url = f"{self._url}{stream_path(MODEL, stream)}/live"
        url += "" if deadline_s is None else f"?timeout_s={deadline_s:.3f}"
        socket = await connect(url, ping_interval=None, compression=None, proxy=None)
        try:
            # the hello
            await socket.recv()
        except BaseException:
            socket.transport.abort()
            raise
        return socket


class Grpc:
    """KServe's V2 protocol over gRPC. A channel is one connection, with one chunk at a time."""

    def __init__(self, url: str):
        self._address, self._idle = url.removeprefix("http://"), list[grpc.aio.Channel]()

    async def send(self, chunk: Chunk, conditions: Conditions = ALWAYS) -> Members:
        request = ModelInferRequest(model_name=MODEL)
        request.parameters["sequence_id"].string_param = chunk.stream
        if chunk.start is not None:
            request.parameters["position"].int64_param = chunk.start
        if conditions.epoch is not None:
            request.parameters["epoch"].string_param = conditions.epoch
        request.inputs.add(name="inputs", datatype="FP32", shape=chunk.rows.shape)
        request.raw_input_contents.append(chunk.rows.astype("<f4").tobytes())
        channel = self._idle.pop() if self._idle else self._open()
        is_answered = False
        try:
            stub = GRPCInferenceServiceStub(channel)
            reply = await stub.ModelInfer(request, timeout=conditions.deadline_s)
            is_answered = True
        except grpc.aio.AioRpcError as error:
            document = dict(error.trailing_metadata()).get("carry-problem-bin")
            if document is None:
                raise NoAnswer(error) from error
            is_answered, problem = True, json.loads(document)
            raise errors.read_problem(problem["status"], problem) from error
        finally:
            if is_answered:
                self._idle.append(channel)
            else:
                await channel.close()
        members = {
            name: getattr(value, value.WhichOneof("parameter_choice"))
            for name, value in reply.parameters.items()
        }
        [output], [data] = reply.outputs, reply.raw_output_contents
        return {
            **members,
            "outputs": {output.name: np.frombuffer(data, "<f4").reshape(output.shape)},
        }

    async def close(self) -> None:
        for channel in self._idle:
            await channel.close()

    def _open(self) -> grpc.aio.Channel:
        options = {
            "grpc.use_local_subchannel_pool": 1,
            "grpc.enable_retries": 0,
            "grpc.enable_http_proxy": 0,
            "grpc.max_reconnect_backoff_ms": 100,
        }
        return grpc.aio.insecure_channel(self._address, tuple(options.items()))


def v1_body(chunk: Chunk, conditions: Conditions, encoding: Encoding) -> dict[str, Any]:
    """The members of version 1's body for a chunk."""
    is_json = encoding == "json"
    inputs = chunk.rows.tolist() if is_json else chunk.rows.astype("<f4").tobytes()
    return without_none({"position": chunk.start, "epoch": conditions.epoch, "inputs": inputs})


def without_none(members: Members) -> dict[str, Any]:
    """The members that have a value."""
    return {name: value for name, value in members.items() if value is not None}


TRANSPORTS: Final[dict[str, Callable[[str], Transport]]] = {
    "json": V1,
    "msgpack": partial(V1, encoding="msgpack"),
    "v2": V2,
    "v2-binary": partial(V2, is_binary=True),
    "websocket": LiveSockets,
    "websocket-json": partial(LiveSockets, encoding="json"),
    GRPC: Grpc,
}


class WorkerClient:
    """One worker: chunks by any transport, streams by version 1. Every request is sent once, and
    fails unless it is answered in time.

    Args:
        urls: of HTTP and, where a transport needs it, of gRPC.
    """

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        transports: Sequence[str],
        timeout_s: float,
    ):
        self._name, self._timeout_s = name, timeout_s
        self._carry = AsyncCarry(urls[0], encoding="json")
        self._transports = [TRANSPORTS[each](urls[each == GRPC]) for each in transports]

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
        head, times_s = _read_head(members), (sent_s, time.monotonic())
        replayed = bool(members.get("replayed"))
        return Reply(*head, chunk, self._name, *times_s, outputs, replayed, code)

    async def read_head(self, stream: str) -> Head:
        """The stream's head."""
        try:
            return Head(*_read_head(await self._request("GET", stream)))
        except Problem as problem:
            if problem.status == 404:
                return NO_HEAD
            raise

    async def delete(self, stream: str, etag: str | None) -> None:
        """Delete a stream."""
        await self._request("DELETE", stream, {} if etag is None else {"if-match": f'"{etag}"'})

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(each.close() for each in (self._carry, *self._transports)))

    async def _request(
        self, method: str, stream: str, headers: dict[str, str] | None = None
    ) -> Any:
        request = self._carry.request(method, stream_path(MODEL, stream), headers=headers)
        return await self._in_time(request)

    async def _in_time(self, request: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await request
        except TimeoutError as error:
            raise NoAnswer(error) from error


def _read_head(members: Members) -> tuple[str | None, bytes | None, int]:
    """Epoch, tag and position of a document that names a stream's head."""
    tag = members.get("tag")
    return members.get("epoch"), tag and bytes.fromhex(tag), members.get("position") or 0
