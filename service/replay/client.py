"""The service over HTTP: one request at a time, and patience while it is away.

Requests take turns among the URLs, and one that failed goes to the next URL. A request is
sent once; whether it is sent again is its caller's choice, by way of `Patience`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

import aiohttp

from models.spec.layout import OutputSpec
from service.replay.options import Format, ReplayError
from service.replay.schedule import Cursor
from service.replay.wire import (
    CONTENT_TYPES,
    Answer,
    Problem,
    dumps,
    loads,
    no_answer,
    read_items,
    read_problem,
    read_reply,
)

REQUEST_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0
FIRST_BACKOFF_S = 0.05
LONGEST_BACKOFF_S = 2.0
LONGEST_RETRY_AFTER_S = 5.0


@dataclass(slots=True)
class Patience:
    """How often and how long one request is tried again.

    Attributes:
        limit_s: longest time from the first failure to the last attempt.
        random: of the jitter that keeps many streams from coming back at once.
        failures: how often `wait` was called.
    """

    limit_s: float
    random: Random
    failures: int = 0
    _since_s: float = field(default=0.0)

    async def wait(self, problem: Problem) -> None:
        """Wait before the next attempt.

        Raises:
            ReplayError: the limit is over.
        """
        now_s = time.monotonic()
        if self.failures == 0:
            self._since_s = now_s
        self.failures += 1
        left_s = self._since_s + self.limit_s - now_s
        if left_s <= 0:
            raise ReplayError(
                f"gave up after {self.limit_s:g} s: {problem.code}: {problem.detail}; "
                "start again to go on from where the streams stand"
            )
        backoff_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (self.failures - 1))
        backoff_s *= self.random.uniform(0.5, 1.0)
        asked_s = min(problem.retry_after_s, LONGEST_RETRY_AFTER_S)
        await asyncio.sleep(min(max(backoff_s, asked_s), left_s))


class Service:
    """A running service, reached at one URL or several."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        urls: Sequence[str],
        model: str,
        encoding: Format = "json",
    ) -> None:
        self._session = session
        self._urls = [url.rstrip("/") for url in urls]
        self._turn = count()
        self._model = f"/v1/models/{model}"
        self._encoding = encoding
        self._headers = {
            "content-type": CONTENT_TYPES[encoding],
            "accept": CONTENT_TYPES[encoding],
        }

    @property
    def urls(self) -> list[str]:
        """Where the service listens."""
        return self._urls

    def turn(self) -> int:
        """A number to choose the URL of the next request by."""
        return next(self._turn)

    async def model(self) -> dict[str, Any] | Problem:
        """The model's description."""
        found = await self._request("GET", self._model, self.turn())
        return found if isinstance(found, (dict, Problem)) else read_problem(500, found)

    async def position(self, stream: str) -> int | Problem:
        """Where a stream stands; 0 for one that does not exist."""
        found = await self._request("GET", f"{self._model}/streams/{stream}", self.turn())
        if isinstance(found, Problem):
            return 0 if found.code == "stream_not_found" else found
        position = found.get("position") if isinstance(found, dict) else None
        return position if isinstance(position, int) else read_problem(500, found)

    async def metrics(self, url: str) -> str | None:
        """The text of /metrics at one URL; None where it is not to be had."""
        try:
            async with self._session.get(f"{url}/metrics") as response:
                text = await response.text()
                return text if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    async def send(self, layout: OutputSpec, cursors: Sequence[Cursor], turn: int) -> list[Answer]:
        """Send the next chunk of each stream, in one request.

        Args:
            layout: the model's outputs.
            cursors: one alone goes to the address of its stream.
            turn: which URL.

        Returns:
            One answer per stream; a request that failed as a whole fails each.

        Raises:
            ReplayError: an answer that is none.
        """
        if len(cursors) == 1:
            path = f"{self._model}/streams/{cursors[0].name}/chunks"
            body = _chunk(cursors[0])
        else:
            path = f"{self._model}/chunks"
            body = {"chunks": [{"stream": cursor.name, **_chunk(cursor)} for cursor in cursors]}
        found = await self._request("POST", path, turn, dumps(self._encoding, body))
        if isinstance(found, Problem):
            return [found] * len(cursors)
        steps = [cursor.size for cursor in cursors]
        if len(cursors) == 1:
            return [read_reply(layout, found, steps[0])]
        return read_items(layout, found, steps)

    async def _request(self, method: str, path: str, turn: int, body: bytes | None = None) -> Any:
        url = self._urls[turn % len(self._urls)] + path
        try:
            async with self._session.request(
                method, url, data=body, headers=self._headers
            ) as response:
                raw = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return no_answer(f"{url}: {str(error) or type(error).__name__}")
        value = loads(response.content_type, raw)
        if response.status >= 400:
            return read_problem(response.status, value)
        return value


@asynccontextmanager
async def connect(
    urls: Sequence[str], model: str, encoding: Format = "json"
) -> AsyncIterator[Service]:
    """A service whose connections are closed on the way out; none is opened yet."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S),
    )
    async with session:
        yield Service(session, urls, model, encoding)


def _chunk(cursor: Cursor) -> dict[str, Any]:
    start = cursor.position
    return {"position": start, "events": cursor.events.events(start, start + cursor.size)}
