"""Transports: the ways by which a client sends a chunk to a worker.

Each is a class with `send` and `close`, and an entry of `TRANSPORTS`; every attempt of a client
draws one of those that the run allows. `traffic.CHUNK_REQUEST` has to match its requests, so that
the stage of their chunks is known when a worker is killed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import numpy as np

from carry_client import AsyncCarry, Encoding, NoAnswer, Problem, encode_body, stream_path
from tests.faults.history import NO_HEAD, Chunk, Head, Reply
from tests.faults.network import MODEL, OUTPUT

TIMEOUT_S: Final = 2.5
STREAM_HEADER: Final = "chunk-of-stream"
"""Names the stream to the proxies, where the address does not; the service ignores it."""

_REJECTIONS: Final = frozenset(
    {"position_ahead", "position_behind", "already_applied", "state_changed", "epoch_mismatch"}
)
T = TypeVar("T")


class Conditions(NamedTuple):
    """What an attempt sends beside the chunk. A transport without If-Match ignores the ETag.

    Attributes:
        deadline_s: within which the service has to answer.
    """

    epoch: str | None = None
    etag: str | None = None
    deadline_s: float | None = None


UNCONDITIONAL: Final = Conditions()


class Transport(Protocol):
    """Sends chunks to one worker."""

    async def send(self, chunk: Chunk, conditions: Conditions = UNCONDITIONAL) -> Mapping[str, Any]:
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
        self._carry, self._is_json = AsyncCarry(url, encoding=encoding), encoding == "json"
        self.close = self._carry.close

    async def send(self, chunk: Chunk, conditions: Conditions = UNCONDITIONAL) -> Mapping[str, Any]:
        inputs = chunk.rows.tolist() if self._is_json else chunk.rows.astype("<f4").tobytes()
        members = {"position": chunk.start, "epoch": conditions.epoch, "inputs": inputs}
        headers = deadline_header(conditions)
        if conditions.etag is not None:
            headers["if-match"] = f'"{conditions.etag}"'
        body = {name: value for name, value in members.items() if value is not None}
        path = f"{stream_path(MODEL, chunk.stream)}/chunks"
        reply: Mapping[str, Any] = await self._carry.request("POST", path, body, headers=headers)
        return reply


class V2:
    """KServe's V2 protocol over HTTP: a stream is a sequence. Replies are JSON."""

    def __init__(self, url: str, *, is_binary: bool = False):
        self._carry, self._is_binary = AsyncCarry(url, encoding="json"), is_binary
        self.close = self._carry.close

    async def send(self, chunk: Chunk, conditions: Conditions = UNCONDITIONAL) -> Mapping[str, Any]:
        parameters: dict[str, Any] = {"sequence_id": chunk.stream}
        parameters |= {} if chunk.start is None else {"position": chunk.start}
        parameters |= {} if conditions.epoch is None else {"epoch": conditions.epoch}
        rows, headers = chunk.rows.astype("<f4"), deadline_header(conditions)
        tensor = {"name": "inputs", "datatype": "FP32", "shape": rows.shape}
        if self._is_binary:
            tensor["parameters"] = {"binary_data_size": rows.nbytes}
        else:
            tensor["data"] = rows.ravel().tolist()
        body = encode_body("json", {"parameters": parameters, "inputs": [tensor]})
        if self._is_binary:
            headers["inference-header-content-length"] = str(len(body))
            body += rows.tobytes()
        headers[STREAM_HEADER] = chunk.stream
        path = f"/v2/models/{MODEL}/infer"
        reply = await self._carry.request("POST", path, body, headers=headers)
        [output] = reply["outputs"]
        outputs = np.reshape(output["data"], output["shape"])
        return {**reply["parameters"], "outputs": {output["name"]: outputs}}


def deadline_header(conditions: Conditions) -> dict[str, str]:
    """The header that says how long the service may take."""
    seconds = conditions.deadline_s
    return {} if seconds is None else {"carry-timeout": f"{seconds:.3f}"}


TRANSPORTS: Final[dict[str, Callable[[str], Transport]]] = {
    "json": V1,
    "msgpack": partial(V1, encoding="msgpack"),
    "v2": V2,
    "v2-binary": partial(V2, is_binary=True),
}


class WorkerClient:
    """One worker: chunks by any transport, streams by version 1. Every request is sent once, and
    fails unless it is answered in time."""

    def __init__(
        self,
        name: str,
        url: str,
        transports: Sequence[str] = tuple(TRANSPORTS),
        timeout_s: float = TIMEOUT_S,
    ):
        self._name = name
        self._carry = AsyncCarry(url, encoding="json")
        self._transports = [TRANSPORTS[each](url) for each in transports]
        self._timeout_s = timeout_s

    async def send(
        self, chunk: Chunk, conditions: Conditions, random: np.random.Generator
    ) -> Reply:
        """Send a chunk by one of the transports: an acknowledgement, or a rejection that names the
        stream's head. Raises every other problem."""
        transport, sent_s = (
            self._transports[random.integers(len(self._transports))],
            time.monotonic(),
        )
        code, outputs = "", None
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


def _read_head(members: Mapping[str, Any]) -> tuple[str | None, bytes | None, int]:
    """Epoch, tag and position of a document that names a stream's head."""
    tag = members.get("tag")
    return members.get("epoch"), tag and bytes.fromhex(tag), members.get("position") or 0
