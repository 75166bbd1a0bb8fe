"""The service of a replay: one client for each address, and copies of chunks.

A stream's chunks go to one address, and to the next while that does not answer; the copies go to
the address after it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np
from numpy.typing import NDArray

from carry_client import (
    AsyncCarry,
    AsyncStream,
    Json,
    ModelDescription,
    Problem,
    Reply,
    Retry,
    stream_path,
)
from carry_client.replies import read_reply
from carry_client.wire import authorization
from service.replay.options import ReplayError, ReplayOptions
from service.replay.schedule import Cursor

FloatRows = NDArray[np.float32]


class Service:
    """One model of a running service, at one address or several."""

    def __init__(
        self, clients: list[AsyncCarry], addresses: dict[str, AsyncCarry], options: ReplayOptions
    ) -> None:
        self._clients, self._addresses, self._options = clients, addresses, options
        self.models = [client.model(options.model) for client in clients]

    @property
    def urls(self) -> list[str]:
        """Addresses of the service."""
        return list(self._addresses)

    async def describe(self) -> ModelDescription:
        """The model's description, once the service answers.

        Raises:
            Problem
            ReplayError: the model takes no events.
        """
        *_, description = [await model.describe() for model in self.models]
        if description.fields is None:
            raise ReplayError(
                f"model {description.name!r} takes no events, only `inputs`: nothing to replay"
            )
        return description

    def stream(self, name: str, number: int) -> AsyncStream:
        """The stream at the address with a number, which counts on after the last one.

        It raises `StreamRolledBack` instead of sending events again, so that the outputs of all
        that are sent again are seen.
        """
        return self.models[number % len(self.models)].stream(name, buffer_events=0)

    async def metrics(self, url: str) -> str | None:
        """The body of `/metrics` at one URL; None if it is not available."""
        try:
            return await self._addresses[url].text("/metrics")
        except Problem:
            return None

    async def send_copy(
        self,
        description: ModelDescription,
        cursor: Cursor,
        number: int,
        count_retry: Callable[[str], None],
    ) -> Reply | Problem:
        """Send a second copy of a chunk, without the head that its first copy continues.

        Args:
            number: of the address.
            count_retry: called with the code of each failed attempt that is repeated.
        """
        client = self._clients[number % len(self._clients)]
        start, path = cursor.position, stream_path(self._options.model, cursor.name)
        body: Json = {"position": start, "events": cursor.chunk()}

        async def attempt() -> Reply:
            try:
                document = await client.request("POST", f"{path}/chunks", body)
            except Problem as problem:
                if problem.is_retryable:
                    count_retry(problem.code)
                raise
            return read_reply(description, document, start)

        try:
            return await Retry(self._options.patience_s).run_async(attempt)
        except Problem as problem:
            return problem


@asynccontextmanager
async def connect(options: ReplayOptions, *, timeout_s: float = 30.0) -> AsyncIterator[Service]:
    """A service whose connections are closed on exit; none is opened yet.

    Raises:
        ReplayError: the access key in the environment is none.
    """
    urls = options.urls
    try:
        authorization()
    except ValueError as error:
        raise ReplayError(str(error)) from error
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                AsyncCarry(
                    [*urls[first:], *urls[:first]],
                    encoding=options.format,
                    timeout_s=timeout_s,
                    deadline_s=options.patience_s,
                )
            )
            for first in range(len(urls))
        ]
        addresses = {url: await stack.enter_async_context(AsyncCarry(url)) for url in urls}
        yield Service(clients, addresses, options)
