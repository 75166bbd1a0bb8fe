"""A service in front of the real one that breaks its promises on purpose.

An ASGI application; a lie looks at a chunk that came and at its honest reply, and gives the
reply that is sent. Everything but chunks goes through untouched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

Json = dict[str, Any]
Forward = Callable[[str, str, bytes], Awaitable[tuple[int, Json]]]
"""Sends method, path and body to the honest service; status and document come back."""
EVERY = 3


@dataclass
class Liar:
    """The application; `lie` is what it does with chunks, None for nothing.

    Attributes:
        chunks: how many have come since the lie was chosen.
        last: the last reply to each stream.
    """

    honest: Any
    lie: Lie | None = None
    chunks: int = 0
    last: dict[str, Json] = field(default_factory=dict)

    def choose(self, lie: Lie | None) -> None:
        """Lie like this from now on."""
        self.lie, self.chunks, self.last = lie, 0, {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        lie = self.lie
        if lie is None or scope["type"] != "http" or not scope["path"].endswith("/chunks"):
            await self.honest(scope, receive, send)
            return
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.chunks += 1
        path = scope["path"]

        async def forward(method: str, path: str, body: bytes) -> tuple[int, Json]:
            return await _ask(self.honest, scope, method, path, body)

        status, document = await lie(self, forward, path, body)
        if status == 200:
            self.last[path] = document
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", b"application/json")],
            }
        )
        await send({"type": "http.response.body", "body": orjson.dumps(document)})


Lie = Callable[[Liar, Forward, str, bytes], Awaitable[tuple[int, Json]]]


async def _ask(app: Any, scope: Any, method: str, path: str, body: bytes) -> tuple[int, Json]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asked = {**scope, "method": method, "path": path, "raw_path": path.encode()}
    await app(asked, receive, send)
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], orjson.loads(content) if content else {}


def twisting(twist: Callable[[Liar, str, Json], Json]) -> Lie:
    """A lie that changes every third reply, not before a stream's second."""

    async def lie(liar: Liar, forward: Forward, path: str, body: bytes) -> tuple[int, Json]:
        status, document = await forward("POST", path, body)
        if status == 200 and liar.chunks % EVERY == 0 and path in liar.last:
            document = twist(liar, path, document)
        return status, document

    return lie


def _scaled(liar: Liar, path: str, reply: Json) -> Json:
    name, values = next(iter(reply["outputs"].items()))
    first, *rest = values
    nudged = [first[0] + 1e-4, *first[1:]] if isinstance(first, list) else first + 1e-4
    return {**reply, "outputs": {**reply["outputs"], name: [nudged, *rest]}}


def _of_another_stream(liar: Liar, path: str, reply: Json) -> Json:
    steps = len(next(iter(reply["outputs"].values())))
    for other, last in liar.last.items():
        if other != path and len(next(iter(last["outputs"].values()))) == steps:
            return {**reply, "outputs": last["outputs"]}
    return reply


def _fewer(liar: Liar, path: str, reply: Json) -> Json:
    return {**reply, "outputs": {name: each[:-1] for name, each in reply["outputs"].items()}}


async def forgetting(liar: Liar, forward: Forward, path: str, body: bytes) -> tuple[int, Json]:
    """Acknowledges a chunk and loses its stream."""
    status, document = await forward("POST", path, body)
    if liar.chunks % EVERY == 0:
        await forward("DELETE", path.removesuffix("/chunks"), b"")
    return status, document


async def swallowing(liar: Liar, forward: Forward, path: str, body: bytes) -> tuple[int, Json]:
    """Answers a chunk as the last one was, and does not apply it: a lost update."""
    if liar.chunks % EVERY == 0 and path in liar.last:
        return 200, liar.last[path]
    return await forward("POST", path, body)


async def mute(liar: Liar, forward: Forward, path: str, body: bytes) -> tuple[int, Json]:
    """Applies every third chunk and says that it does not know."""
    found = await forward("POST", path, body)
    return (503, problem("outcome_unknown")) if liar.chunks % EVERY == 0 else found


async def busy(liar: Liar, forward: Forward, path: str, body: bytes) -> tuple[int, Json]:
    """Turns every third chunk away."""
    if liar.chunks % EVERY == 0:
        return 503, problem("overloaded")
    return await forward("POST", path, body)


async def slow(liar: Liar, forward: Forward, path: str, body: bytes) -> tuple[int, Json]:
    """Answers late, and rightly."""
    await asyncio.sleep(SLOW_S)
    return await forward("POST", path, body)


SLOW_S = 0.15
LIES: dict[str, tuple[Lie, str]] = {
    "a wrong output": (twisting(_scaled), "wrong_outputs"),
    "another stream's outputs": (twisting(_of_another_stream), "wrong_outputs"),
    "one output too few": (twisting(_fewer), "wrong_outputs"),
    "a position too far": (
        twisting(lambda liar, path, reply: {**reply, "position": reply["position"] + 1}),
        "wrong_position",
    ),
    "another stream's name": (
        twisting(lambda liar, path, reply: {**reply, "stream": "other"}),
        "wrong_stream",
    ),
    "another epoch": (
        twisting(lambda liar, path, reply: {**reply, "epoch": "0" * 16}),
        "wrong_epoch",
    ),
    "another history": (
        twisting(lambda liar, path, reply: {**reply, "tag": "0" * 32}),
        "wrong_tag",
    ),
    "a replay of nothing": (
        twisting(lambda liar, path, reply: {**reply, "replayed": True}),
        "wrong_replay",
    ),
    "no outputs at all": (
        twisting(lambda liar, path, reply: {"position": reply["position"]}),
        "unreadable",
    ),
    "a lost stream": (forgetting, "position_ahead"),
}
"""Each with the code of the fault that has to be found."""


def problem(code: str) -> Json:
    """A retryable problem document."""
    return {"status": 503, "code": code, "detail": f"it is {code}", "retryable": True}
