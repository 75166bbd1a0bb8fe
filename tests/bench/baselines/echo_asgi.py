"""The fastest baseline: a bare ASGI application that reads the body and answers a fixed one.

BENCH_REPLY_BYTES=1800 uvicorn tests.bench.baselines.echo_asgi:app
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

REPLY_BYTES = int(os.environ.get("BENCH_REPLY_BYTES", "1800"))
BODY = b'{"outputs":"' + b"0" * (REPLY_BYTES - 14) + b'"}'
HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(BODY)).encode()),
]

Message = MutableMapping[str, Any]


async def app(
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Read the whole body, answer with a constant; nothing but HTTP."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})
