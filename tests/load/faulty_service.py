"""Faulty service: an ASGI application before the real one that gives wrong answers on purpose.

A behavior sees a chunk's request and can change its reply; everything but chunks passes unchanged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

Json = dict[str, Any]
Answer = tuple[int, Json]
Forward = Callable[[str, str, bytes], Awaitable[Answer]]
"""Sends method, path and body to the correct service; returns status and document."""
EVERY = 3
SLOW_S = 0.15


@dataclass
class FaultyService:
    """The application.

    Attributes:
        behavior: what happens to chunks; None for nothing.
        chunks: how many came since the behavior was chosen.
        last: the last reply to each path.
    """

    correct: Any = None
    behavior: Behavior | None = None
    chunks: int = 0
    last: dict[str, Json] = field(default_factory=dict)

    @property
    def is_due(self) -> bool:
        """Whether this is one of the chunks that go wrong."""
        return self.chunks % EVERY == 0

    def choose(self, behavior: Behavior | None) -> None:
        """Behave like this from now on."""
        self.behavior, self.chunks, self.last = behavior, 0, {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if self.behavior is None or not path.endswith("/chunks"):
            await self.correct(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.chunks += 1

        async def forward(method: str, path: str, body: bytes) -> Answer:
            sent: list[Any] = []
            unread = [body]

            async def receive_body() -> Any:
                """The body once, then the client's disconnect, which a slow request waits for."""
                if unread:
                    return {"type": "http.request", "body": unread.pop(), "more_body": False}
                return await receive()

            async def send(message: Any) -> None:
                sent.append(message)

            request = {**scope, "method": method, "path": path, "raw_path": path.encode()}
            await self.correct(request, receive_body, send)
            content = b"".join(message.get("body", b"") for message in sent[1:])
            return sent[0]["status"], orjson.loads(content) if content else {}

        status, document = await self.behavior(self, forward, path, body)
        if status == 200:
            self.last[path] = document
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": orjson.dumps(document)})


Behavior = Callable[[FaultyService, Forward, str, bytes], Awaitable[Answer]]


def changing(change: Callable[[FaultyService, str, Json], Json]) -> Behavior:
    """Changes every third reply, but not a stream's first."""

    async def behavior(service: FaultyService, forward: Forward, path: str, body: bytes) -> Answer:
        status, document = await forward("POST", path, body)
        if status == 200 and service.is_due and path in service.last:
            document = change(service, path, document)
        return status, document

    return behavior


def _nudge(service: FaultyService, path: str, reply: Json) -> Json:
    name, values = next(iter(reply["outputs"].items()))
    first, *rest = values
    nudged = [first[0] + 1e-4, *first[1:]] if isinstance(first, list) else first + 1e-4
    return {**reply, "outputs": {**reply["outputs"], name: [nudged, *rest]}}


def _swap(service: FaultyService, path: str, reply: Json) -> Json:
    steps = len(next(iter(reply["outputs"].values())))
    for other, last in service.last.items():
        if other != path and len(next(iter(last["outputs"].values()))) == steps:
            return {**reply, "outputs": last["outputs"]}
    return reply


def _shorten(service: FaultyService, path: str, reply: Json) -> Json:
    return {**reply, "outputs": {name: each[:-1] for name, each in reply["outputs"].items()}}


def _replace(**members: Any) -> Behavior:
    return changing(lambda service, path, reply: {**reply, **members})


async def lose_stream(service: FaultyService, forward: Forward, path: str, body: bytes) -> Answer:
    """Acknowledges every third chunk and deletes its stream."""
    status, document = await forward("POST", path, body)
    if service.is_due:
        await forward("DELETE", path.removesuffix("/chunks"), b"")
    return status, document


async def lose_update(service: FaultyService, forward: Forward, path: str, body: bytes) -> Answer:
    """Answers every third chunk with the last reply, and does not apply it."""
    if service.is_due and path in service.last:
        return 200, service.last[path]
    return await forward("POST", path, body)


async def hide_outcome(service: FaultyService, forward: Forward, path: str, body: bytes) -> Answer:
    """Applies every third chunk and answers `outcome_unknown`."""
    answer = await forward("POST", path, body)
    return (503, problem("outcome_unknown")) if service.is_due else answer


async def overload(service: FaultyService, forward: Forward, path: str, body: bytes) -> Answer:
    """Rejects every third chunk."""
    return (503, problem("overloaded")) if service.is_due else await forward("POST", path, body)


async def delay(service: FaultyService, forward: Forward, path: str, body: bytes) -> Answer:
    """Answers late, and correctly."""
    await asyncio.sleep(SLOW_S)
    return await forward("POST", path, body)


WRONG_ANSWERS: dict[str, tuple[Behavior, str]] = {
    "a wrong output": (changing(_nudge), "wrong_outputs"),
    "another stream's outputs": (changing(_swap), "wrong_outputs"),
    "one output too few": (changing(_shorten), "wrong_outputs"),
    "a position too far": (
        changing(lambda service, path, reply: {**reply, "position": reply["position"] + 1}),
        "wrong_position",
    ),
    "another stream's name": (_replace(stream="other"), "wrong_stream"),
    "another epoch": (_replace(epoch="0" * 16), "wrong_epoch"),
    "another history": (_replace(tag="0" * 32), "wrong_tag"),
    "a replay of nothing": (_replace(replayed=True), "wrong_replay"),
    "no outputs at all": (
        changing(lambda service, path, reply: {"position": reply["position"]}),
        "unreadable",
    ),
    "a lost stream": (lose_stream, "position_ahead"),
}
"""Each with the code of the fault that must be detected."""


def problem(code: str) -> Json:
    """A retryable problem document."""
    return {"status": 503, "code": code, "detail": f"it is {code}", "retryable": True}
