"""The floor of the targets: a bare FastAPI route that reads the body and answers a fixed one.

    BENCH_REPLY_BYTES=1800 uvicorn tests.bench.baselines.echo:app

The reply has the size of Carry's, so that the difference is Carry's work and not the bytes.
"""

import os

from fastapi import FastAPI, Request, Response

BODY = b'{"outputs":"' + b"0" * (int(os.environ.get("BENCH_REPLY_BYTES", "1800")) - 14) + b'"}'
app = FastAPI()


@app.post("/{path:path}")
async def echo(request: Request) -> Response:
    """Read the body, answer with a constant."""
    await request.body()
    return Response(BODY, media_type="application/json")
