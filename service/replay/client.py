"""The service of a replay: one URL or several, one attempt a call, replies checked for shape.

Requests take turns among the URLs; one that failed goes to the next URL.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carry_client import (
    AsyncCarry,
    ModelDescription,
    Problem,
    model_path,
    read_description,
    read_problem,
    stream_path,
)
from service.replay.options import Format, ReplayError
from service.replay.schedule import Cursor

FloatRows = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """One chunk's reply.

    Attributes:
        position: of the stream after the chunk.
        outputs: float32 [T, O], packed by the model's description.
    """

    stream: str
    epoch: str
    tag: str
    position: int
    replayed: bool
    outputs: FloatRows


Answer = Reply | Problem


class Service:
    """One model of a running service."""

    def __init__(self, services: Sequence[AsyncCarry], model: str) -> None:
        self._services = services
        self._turns = count()
        self._model = model

    @property
    def urls(self) -> list[str]:
        """Addresses of the service."""
        return [service.url for service in self._services]

    def next_turn(self) -> int:
        """A number that chooses the URL of the next request."""
        return next(self._turns)

    async def describe(self) -> ModelDescription:
        """The model's description.

        Raises:
            Problem
            ReplayError: it cannot be read, or the model takes no events.
        """
        document = await self._at(self.next_turn()).request("GET", model_path(self._model))
        try:
            description = read_description(document)
        except ValueError as error:
            raise ReplayError(str(error)) from error
        if description.fields is None:
            raise ReplayError(
                f"model {self._model!r} takes no events, only `inputs`: nothing to replay"
            )
        return description

    async def position(self, stream: str) -> int:
        """The position of a stream; 0 for one that does not exist.

        Raises:
            Problem
        """
        path = stream_path(self._model, stream)
        try:
            document: Any = await self._at(self.next_turn()).request("GET", path)
        except Problem as problem:
            if problem.code == "stream_not_found":
                return 0
            raise
        return int(document["position"])

    async def metrics(self, url: str) -> str | None:
        """The text of /metrics at one URL; None if it is not available."""
        try:
            return await self._services[self.urls.index(url)].text("/metrics")
        except Problem:
            return None

    async def send(
        self, model: ModelDescription, cursors: Sequence[Cursor], turn: int
    ) -> list[Answer]:
        """Send the next chunk of each stream, in one request.

        Args:
            cursors: one alone goes to the address of its stream.
            turn: which URL.

        Returns:
            One answer per stream; a request that failed as a whole fails each.

        Raises:
            ReplayError: the reply cannot be read.
        """
        if len(cursors) == 1:
            path, body = f"{stream_path(self._model, cursors[0].name)}/chunks", _chunk(cursors[0])
        else:
            path = f"{model_path(self._model)}/chunks"
            body = {"chunks": [{"stream": cursor.name, **_chunk(cursor)} for cursor in cursors]}
        try:
            document = await self._at(turn).request("POST", path, body)
        except Problem as problem:
            return [problem] * len(cursors)
        if len(cursors) == 1:
            return [read_reply(model, document, cursors[0].size)]
        return read_items(model, document, [cursor.size for cursor in cursors])

    def _at(self, turn: int) -> AsyncCarry:
        return self._services[turn % len(self._services)]


@asynccontextmanager
async def connect(
    urls: Sequence[str], model: str, encoding: Format = "json", *, timeout_s: float = 30.0
) -> AsyncIterator[Service]:
    """A service whose connections are closed on exit; none is opened yet."""
    async with AsyncExitStack() as stack:
        services = [AsyncCarry(url, encoding=encoding, timeout_s=timeout_s) for url in urls]
        for service in services:
            await stack.enter_async_context(service)
        yield Service(services, model)


def read_reply(model: ModelDescription, document: Any, steps: int) -> Reply:
    """One chunk's reply out of its document.

    Args:
        steps: T, events in the chunk.

    Raises:
        ReplayError: it is not a reply to T events of that model.
    """
    try:
        return Reply(
            stream=str(document["stream"]),
            epoch=str(document["epoch"]),
            tag=str(document["tag"]),
            position=int(document["position"]),
            replayed=bool(document["replayed"]),
            outputs=model.pack(document["outputs"], steps),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ReplayError(
            f"the service's reply cannot be read ({type(error).__name__}: {error}): "
            f"{str(document)[:200]}"
        ) from error


def read_items(model: ModelDescription, document: Any, steps: Sequence[int]) -> list[Answer]:
    """The outcomes of a request for many streams, in its order.

    Raises:
        ReplayError: it is not an answer to that many items.
    """
    items = document.get("results") if isinstance(document, dict) else None
    if not isinstance(items, list) or len(items) != len(steps):
        raise ReplayError(f"expected {len(steps)} results in one reply, got {str(document)[:200]}")
    return [_read_item(model, item, size) for item, size in zip(items, steps, strict=True)]


def _read_item(model: ModelDescription, item: Any, steps: int) -> Answer:
    if not isinstance(item, dict):
        raise ReplayError(f"expected results that are objects, got {str(item)[:200]}")
    if "error" in item:
        return read_problem(int(item.get("status", 500)), item["error"])
    return read_reply(model, item.get("reply"), steps)


def _chunk(cursor: Cursor) -> dict[str, Any]:
    start = cursor.position
    return {"position": start, "events": cursor.events.events(start, start + cursor.size)}
