"""Errors of V2 over HTTP.

`{"error": "code: detail"}`, with the members of a problem document beside it. The header
`Carry-Error` has the code alone, and the status is that of the HTTP API.
"""

from __future__ import annotations

from typing import Final

from service.codec.media import Media, dumps
from service.core.errors import CarryError
from service.server.errors import MethodNotAllowed
from service.transports.v1.problems import problem, problem_headers
from service.transports.v1.replies import Answer

JSON: Final = (b"content-type", b"application/json")


def error_answer(error: CarryError) -> Answer:
    """The response to a request that failed."""
    document = problem(error)
    content = {"error": f"{error.code}: {error.detail}", **document}
    headers = [(b"carry-error", error.code.encode()), *problem_headers(document)]
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", ", ".join(error.facts["expected"]).encode()))
    return Answer(dumps(Media.JSON, content), JSON, document["status"], headers)
