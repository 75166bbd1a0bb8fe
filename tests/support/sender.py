"""Client that sends a stream of the probe model to a service and recovers from faults."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
from numpy.typing import NDArray

from tests.support.pipelines import rows_of

LONG_S = 120.0
BUSY = (429, 503, 504)


class Sender:
    """One stream's events, sent in chunks, each sent again until it is answered.

    Attributes:
        position: the last acknowledged position.
    """

    def __init__(self, name: str, seed: int, events: int = 60):
        self.random = np.random.default_rng(seed)
        self.path = f"/v1/models/probe/streams/{name}/chunks"
        self.rows = rows_of(self.random, events)
        self.position = 0
        self.outputs = np.zeros((events, 7), np.float32)

    async def send(
        self, client: httpx.AsyncClient, until_position: int, has_reply: asyncio.Event | None = None
    ) -> None:
        """Send up to a position; sets `has_reply` after the first reply."""
        async with asyncio.timeout(LONG_S):
            while self.position < until_position:
                count = int(self.random.integers(1, 9))
                piece = self.rows[self.position : min(self.position + count, until_position)]
                await self._send(client, piece)
                if has_reply is not None:
                    has_reply.set()

    async def _send(self, client: httpx.AsyncClient, piece: NDArray[np.float32]) -> None:
        """Send one chunk until it is answered."""
        body = {"position": self.position, "inputs": piece.tolist()}
        while True:
            try:
                response = await client.post(self.path, json=body)
            except httpx.TransportError:
                response = None
            if response is not None and response.status_code not in BUSY:
                break
            await asyncio.sleep(0.05)
        reply = response.json()
        assert response.status_code == 200, reply
        end = self.position + len(piece)
        for name, columns in (("last", slice(0, 4)), ("out", slice(4, 6)), ("steep", slice(6, 7))):
            self.outputs[self.position : end, columns] = np.array(reply["outputs"][name])
        assert reply["position"] == end
        self.position = end


async def send_all(url: str, senders: list[Sender], until_position: int) -> None:
    """Send all of them up to a position, at once."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        await asyncio.gather(*(sender.send(client, until_position) for sender in senders))
