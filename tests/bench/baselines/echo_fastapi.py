"""The baseline of the targets: a bare FastAPI route.

    BENCH_REPLY_BYTES=1800 uvicorn tests.bench.baselines.echo_fastapi:app

It reads the body and answers with a fixed one of the size of Carry's reply, so that the difference
is Carry's work and not the size of the bytes.
"""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from tests.bench.baselines.echo_asgi import BODY

app = FastAPI()


@app.post("/{path:path}")
async def echo(request: Request) -> Response:
    """Read the body, answer with a constant."""
    await request.body()
    return Response(BODY, media_type="application/json")
