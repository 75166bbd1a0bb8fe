"""The console: a web page to watch models and streams, at `/console/`.

The page and its assets contain no data: the page requests everything from the public API, with the
user's key. They are built from `web/` by `make console`, and their names contain a hash of their
content, so that browsers may cache them as immutable. The page loads nothing from other hosts.
"""

from __future__ import annotations

import mimetypes
from hashlib import sha256
from pathlib import Path
from typing import Final

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from service.transports.v1.pages import page_headers

PATH: Final = "/console"
ASSETS: Final = Path(__file__).parent / "assets"
PAGE: Final = "index.html"

_SECURITY: Final = page_headers(directives=["require-trusted-types-for 'script'"])


def add_console(app: FastAPI) -> None:
    """Serve the console in an application, from memory."""
    files = {path.name: path.read_bytes() for path in sorted(ASSETS.iterdir())}

    async def get_console(request: Request) -> Response:
        # relative, since a proxy may serve the API under another path
        return RedirectResponse("console/", status_code=308)

    async def get_asset(request: Request, asset: str = "") -> Response:
        name = asset or PAGE
        body = files.get(name)
        if body is None or asset == PAGE:
            raise HTTPException(404)
        etag = f'"{sha256(body).hexdigest()[:32]}"'
        headers = {**_SECURITY, "etag": etag, "cache-control": _cache_control(name)}
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        media_type, _ = mimetypes.guess_type(name)
        return Response(body, headers=headers, media_type=media_type)

    for path, endpoint in (
        (PATH, get_console),
        (f"{PATH}/", get_asset),
        (f"{PATH}/{{asset}}", get_asset),
    ):
        app.add_api_route(path, endpoint, methods=["GET"], include_in_schema=False)


def _cache_control(name: str) -> str:
    return "no-cache" if name == PAGE else "public, max-age=31536000, immutable"
