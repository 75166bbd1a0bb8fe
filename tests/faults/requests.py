"""WorkerClient: requests about streams to one worker, each sent once and answered in time."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import numpy as np

from carry_client import AsyncCarry, Encoding, Problem, encode_body, stream_path
from tests.faults.history import Head, Reply, Sent
from tests.faults.network import MODEL, OUTPUT, Outputs, Rows

TIMEOUT_S: Final = 2.5
_MEDIA: Final[dict[Encoding, str]] = {"json": "application/json", "msgpack": "application/msgpack"}


class WorkerClient:
    """A client of the worker behind one port; a connection is dropped on any failure."""

    def __init__(self, port: int, timeout_s: float = TIMEOUT_S):
        self._carry = AsyncCarry(
            f"http://127.0.0.1:{port}", timeout_s=2 * timeout_s, encoding="json"
        )
        self._timeout_s = timeout_s
        self.close = self._carry.close

    async def send(
        self,
        stream: str,
        rows: Rows,
        position: int | None,
        *,
        encoding: Encoding = "json",
        epoch: str | None = None,
        etag: str | None = None,
        deadline_s: float | None = None,
    ) -> dict[str, Any]:
        """Send a chunk: the reply's document.

        Args:
            deadline_s: value of the Carry-Timeout header.

        Raises:
            Problem: of status 0 where the request may or may not have been carried out.
        """
        inputs = rows.tolist() if encoding == "json" else rows.astype("<f4").tobytes()
        members = {"position": position, "epoch": epoch, "inputs": inputs}
        body = encode_body(encoding, {k: v for k, v in members.items() if v is not None})
        headers = {"content-type": _MEDIA[encoding], "accept": _MEDIA[encoding]}
        if deadline_s is not None:
            headers["carry-timeout"] = f"{deadline_s:.3f}"
        path = f"{stream_path(MODEL, stream)}/chunks"
        document: dict[str, Any] = await self._request("POST", path, body, etag, headers)
        return document

    async def read_head(self, stream: str) -> Head | None:
        """The stream's head; None where it does not exist."""
        try:
            document = await self._request("GET", stream_path(MODEL, stream))
        except Problem as problem:
            if problem.status == 404:
                return None
            raise
        return Head(document["epoch"], bytes.fromhex(document["tag"]), document["position"])

    async def delete(self, stream: str, etag: str | None) -> None:
        """Delete a stream."""
        await self._request("DELETE", stream_path(MODEL, stream), etag=etag)

    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        etag: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Any:
        if etag is not None:
            headers = {**(headers or {}), "if-match": f'"{etag}"'}
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._carry.request(method, path, body, headers=headers)
        except TimeoutError as error:
            raise Problem(0, "no_answer", "the reply took too long", is_retryable=True) from error


def outputs_of(document: dict[str, Any]) -> Outputs:
    """The outputs of a reply, float32 [T, H]."""
    return np.asarray(document["outputs"][OUTPUT], np.float32)


def read_reply(
    document: dict[str, Any], sent: Sent, worker: str, sent_s: float, code: str = ""
) -> Reply:
    """The record of a reply's document, or of a problem's that names the stream's head."""
    tag = document.get("tag")
    return Reply(
        document.get("epoch"),
        None if tag is None else bytes.fromhex(tag),
        document.get("position") or 0,
        sent,
        worker,
        sent_s,
        time.monotonic(),
        None if code else outputs_of(document),
        bool(document.get("replayed")),
        code,
    )
