"""One route of the API: how it is served, and what the OpenAPI document says of it.

FastAPI matches requests to routes and writes the document. What a request says is read by `Call`:
FastAPI would use the first of several If-Match lines and the last of duplicate query parameters,
ignore unknown ones, and take 27 to 60 us a request, of the 71 us that a chunk of 16 events takes on
the slow path without engine and store (docs/decisions/http.md).
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from service.access.caller import Verb
from service.codec.media import SERVED, Media
from service.codec.reply_types import EXAMPLE_STREAM
from service.core import errors
from service.core.errors import CarryError, leaf_errors
from service.core.values import STREAM_NAME
from service.server import errors as http_errors
from service.transports.v1.call import Call
from service.transports.v1.problems import LATER, PROBLEM_JSON, STATUS, problem

Parameter = dict[str, Any]
"""A parameter as in the OpenAPI document."""

Endpoint = Callable[[Any], Coroutine[Any, Any, Response]]

_ANY = (
    errors.InvalidInput,
    http_errors.MalformedRequest,
    http_errors.DuplicateField,
    http_errors.HeadTooLarge,
    http_errors.HostNotAllowed,
    http_errors.ExpectationFailed,
    http_errors.RequestTimeout,
    http_errors.TooManyConnections,
    errors.Unauthenticated,
    errors.Forbidden,
    errors.InternalError,
)
_OF_BODY = (errors.MalformedBody, errors.BodyTooLarge, errors.UnsupportedMediaType)
_RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds to wait before the same request is sent again, if it may be.",
        "schema": {"type": "integer", "minimum": 1},
    }
}


def parameter(
    place: str, name: str, description: str, schema: Mapping[str, Any], *, required: bool = False
) -> Parameter:
    """A parameter of a route, in the `query`, the `path` or a `header`."""
    return {
        "in": place,
        "name": name,
        "description": description,
        "required": required,
        "schema": dict(schema),
    }


_OF_PATH = (
    parameter(
        "path",
        "model",
        "The model's slug.",
        {"type": "string", "examples": ["flights"]},
        required=True,
    ),
    parameter(
        "path",
        "stream",
        "The stream's name.",
        {"type": "string", "pattern": STREAM_NAME, "examples": [EXAMPLE_STREAM]},
        required=True,
    ),
)
IF_MATCH = parameter(
    "header",
    "If-Match",
    "Apply only if the stream is in one of the states that these strong ETags name; `*` for any.",
    {"type": "string"},
)
_REQUEST_ID = parameter(
    "header",
    "X-Request-ID",
    "An id for logs and problems; generated if absent.",
    {"type": "string"},
)


class Route(APIRoute):
    """One route. The docstring of its endpoint is its summary and its description.

    Args:
        endpoint: called with the `Call`, or with the request if the path names no model; the name
            of its module is the tag, if there is no other.
        verbs: of an access key, each of which allows the route.
        replies: what each status of success means.
        reply: the type of their body; None if it is not one of the API's, or there is none.
        content: schemas of other media types of these replies.
        headers: of these replies.
        parameters: besides those of the path and the request's id, which every route has.
        body: the component of its body.
        problems: its errors besides those that follow from the rest: a body may be malformed.
        is_health: whether it is one of health, which answers in JSON.
        options: further arguments of FastAPI.
    """

    def __init__(
        self,
        method: str,
        path: str,
        endpoint: Endpoint,
        *,
        verbs: tuple[Verb, ...] = (),
        replies: Mapping[int, str] | None = None,
        reply: Any = None,
        content: Mapping[str, Any] | None = None,
        headers: Mapping[str, Any] | None = None,
        parameters: tuple[Parameter, ...] = (),
        body: str | None = None,
        problems: tuple[type[CarryError], ...] = (),
        is_health: bool = False,
        tag: str = "",
        **options: Any,
    ):
        self.verbs = verbs
        self.body = body
        self.reply = reply
        self.query_names = [each["name"] for each in parameters if each["in"] == "query"]
        self.header_names = {each["name"] for each in parameters if each["in"] == "header"}
        self._call_endpoint = endpoint
        extra: dict[str, Any] = {"security": _security(verbs, is_health=is_health)}
        if not is_health:
            of_path = [each for each in _OF_PATH if f"{{{each['name']}}}" in path]
            extra["parameters"] = [*of_path, *parameters, _REQUEST_ID]
        if body is not None:
            contents = {media: {"schema": _reference(body)} for media in SERVED}
            extra["requestBody"] = {"required": True, "content": contents}
        described: dict[str, Any] = {} if content is None else {"content": content}
        if reply is not None:
            described["model"] = reply
            if not is_health:
                packed = {"schema": _reference(reply.__name__)}
                described["content"] = {Media.MSGPACK.value: packed}
        if headers:
            described["headers"] = headers
        responses: dict[int | str, Any] = {
            status: {"description": meaning, **described}
            for status, meaning in (replies or {}).items()
        }
        if not is_health:
            responses = _problems(self._errors(path, problems)) | responses
        summary, _, description = (inspect.getdoc(endpoint) or "").partition("\n\n")
        super().__init__(
            path,
            _read_by_call,
            name=endpoint.__name__,
            methods=[method],
            summary=summary.removesuffix("."),
            description=description,
            tags=[tag or endpoint.__module__.rpartition(".")[2]],
            responses=responses,
            openapi_extra=extra,
            **options,
        )

    def get_route_handler(self) -> Endpoint:
        """The handler of a request, without FastAPI's dependency resolution and exit stacks."""
        endpoint = self._call_endpoint
        if "{model}" not in self.path:
            return endpoint

        async def handle(request: Request) -> Response:
            return await endpoint(Call(request, self))

        return handle

    def _errors(self, path: str, problems: Iterable[type[CarryError]]) -> set[type[CarryError]]:
        kinds: set[type[CarryError]] = {*_ANY, *problems}
        if self.body is not None:
            kinds.update(_OF_BODY)
        if self.reply is not None:
            kinds.add(errors.NotAcceptable)
        if "{model}" in path:
            kinds.add(errors.ModelNotFound)
        if "{stream}" in path:
            kinds.add(errors.InvalidName)
        if IF_MATCH["name"] in self.header_names:
            kinds.update((errors.InvalidPrecondition, errors.StateChanged))
        return kinds


async def _read_by_call(request: Request) -> None:
    """What FastAPI is told of an endpoint."""


def _security(verbs: Iterable[Verb], *, is_health: bool) -> list[dict[str, list[str]]]:
    """Each verb alone is enough, and a service without access keys is open."""
    allowed = [{"access_key": [verb.value]} for verb in verbs]
    return [] if is_health and not allowed else [*allowed, {}]


def _reference(component: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{component}"}


def _problems(kinds: set[type[CarryError]]) -> dict[int | str, Any]:
    """The problem responses of a route, one per status, with an example per code."""
    by_status: defaultdict[int, list[type[CarryError]]] = defaultdict(list)
    for kind in leaf_errors():
        if kind in kinds:
            by_status[STATUS[kind]].append(kind)
    return {
        status: {
            "description": ", ".join(f"`{kind.code}`: {kind.title}" for kind in of_status),
            **({"headers": _RETRY_AFTER} if status in LATER else {}),
            "content": {
                PROBLEM_JSON: {
                    "schema": _reference("Problem"),
                    "examples": {
                        kind.code: {
                            "summary": kind.title,
                            "value": problem(kind(f"{kind.title}."), "6f1d0c2e9a7b4853"),
                        }
                        for kind in of_status
                    },
                }
            },
        }
        for status, of_status in sorted(by_status.items())
    }
