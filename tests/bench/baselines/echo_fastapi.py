"""The floor of the comparison: a bare FastAPI route that reads the body and answers at once.

    uvicorn tests.bench.floor:app

It answers with a fixed body of the size of Carry's reply, so that what lies between the two is
Carry's work and not the size of the bytes.
"""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

REPLY_BYTES = 1800
BODY = b'{"outputs":"' + b"0" * (REPLY_BYTES - 14) + b'"}'

app = FastAPI()


@app.post("/{path:path}")
async def echo(request: Request) -> Response:
    """Read the body, answer with a constant."""
    await request.body()
    return Response(BODY, media_type="application/json")
