"""Drives calls in an event loop: sends their requests, sleeps, reads their sources."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from ssl import SSLContext
from typing import Any, TypeVar

import httpx

from carry_client.calls import END, LATE, Call, Effect, Emit, Failed, Open, Read, Sleep, resume
from carry_client.errors import NoAnswer, cut_causes
from carry_client.wire import UNAVAILABLE, Addresses, Request, Response, http_timeout

T = TypeVar("T")


class AsyncDriver:
    """Connections to one service, for one event loop at a time.

    Each request in flight has an `httpx.AsyncClient` with one connection: httpx's own pool looks at
    every connection at every request, which made 64 concurrent requests four times slower.
    """

    def __init__(self, addresses: Addresses, context: SSLContext) -> None:
        """Nothing is requested yet."""
        self._addresses, self._context = addresses, context
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle: list[httpx.AsyncClient] = []

    async def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            await self._idle.pop().aclose()

    async def send(self, request: Request) -> Response:
        """One attempt of a request.

        Raises:
            NoAnswer
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            # connections of a loop that ended, or of the parent process
            self._loop, self._idle = loop, []
        client = self._idle.pop() if self._idle else self._new_client()
        url = self._addresses.current
        try:
            response = await client.request(
                request.method,
                url + request.path,
                content=request.content,
                headers=request.headers,
                params=request.params,
                timeout=http_timeout(request.timeout_s),
            )
        except httpx.HTTPError as error:
            self._addresses.fail_over(url)
            raise NoAnswer(error, url) from cut_causes(error)
        finally:
            self._idle.append(client)
        if response.status_code == UNAVAILABLE:
            self._addresses.fail_over(url)
        return Response.of(response)

    async def run(self, call: Call[T]) -> T:
        """The result of a call."""
        try:
            effect = next(call)
            while True:
                effect = resume(call, await self._outcome(effect))
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            call.close()

    async def iterate(self, call: Call[None]) -> AsyncIterator[Any]:
        """The values that a call emits."""
        try:
            effect = next(call)
            while True:
                if isinstance(effect, Emit):
                    yield effect.value
                    effect = next(call)
                else:
                    effect = resume(call, await self._outcome(effect))
        except StopIteration:
            return
        finally:
            call.close()

    def _new_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(verify=self._context)

    async def _outcome(self, effect: Effect) -> object:
        try:
            return await self._perform(effect)
        except Exception as error:
            return Failed(error)

    async def _perform(self, effect: Effect) -> object:
        if isinstance(effect, Request):
            return await self.send(effect)
        if isinstance(effect, Sleep):
            await asyncio.sleep(effect.seconds)
            return None
        if isinstance(effect, Open):
            return _Reader(effect.source)
        if isinstance(effect, Read):
            return await effect.reader.read(effect.wait_s)
        raise TypeError(f"{effect} belongs to a call that is iterated over")


class _Reader:
    """Reads an iterable of either kind."""

    def __init__(self, source: Iterable[Any] | AsyncIterable[Any]) -> None:
        self._source = aiter(source) if isinstance(source, AsyncIterable) else iter(source)
        self._reading: asyncio.Task[object] | None = None

    def close(self) -> None:
        """Stop waiting for an item."""
        if self._reading is not None:
            self._reading.cancel()

    async def read(self, wait_s: float | None) -> object:
        """The next item, END, or LATE after `wait_s`; an item that is late comes next."""
        if not isinstance(self._source, AsyncIterator):
            return next(self._source, END)
        if wait_s is None and self._reading is None:
            return await anext(self._source, END)
        if self._reading is None:
            self._reading = asyncio.ensure_future(_next(self._source))
        await asyncio.wait({self._reading}, timeout=wait_s)
        if not self._reading.done():
            return LATE
        reading, self._reading = self._reading, None
        return reading.result()


async def _next(source: AsyncIterator[Any]) -> object:
    return await anext(source, END)
