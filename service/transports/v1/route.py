"""One route of the API: how FastAPI serves it, and what the OpenAPI document says of it.

FastAPI routes requests and writes the document. It reads only the path parameters: it would use the
first of several If-Match lines and the last of duplicate query parameters, and ignore unknown ones,
so `request_fields` reads all others.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from fastapi import Path
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from service.access.caller import Verb
from service.codec.media import SERVED, Media
from service.codec.schema_fields import EXAMPLE_STREAM
from service.core import errors
from service.core.errors import CarryError, leaf_errors
from service.core.values import STREAM_NAME
from service.server import errors as http_errors
from service.transports.v1 import reply_types
from service.transports.v1.problems import LATER, PROBLEM_JSON, REFERENCE
from service.transports.v1.statuses import STATUS

Parameter = dict[str, Any]
"""A parameter as in the OpenAPI document."""

Responses = dict[int | str, dict[str, Any]]

ModelPath = Annotated[str, Path(description="The model's slug.", examples=["flights"])]
StreamPath = Annotated[
    str,
    # `stream_name` checks the pattern, and makes the error
    Path(
        description="The stream's name.",
        examples=[EXAMPLE_STREAM],
        json_schema_extra={"pattern": STREAM_NAME},
    ),
]

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
    """A parameter of a route, in the `query` or a `header`."""
    return {
        "in": place,
        "name": name,
        "description": description,
        "required": required,
        "schema": dict(schema),
    }


IF_MATCH = parameter(
    "header",
    "If-Match",
    "Apply only if the stream is in one of the states that these strong ETags name; `*` for any.",
    {"type": "string"},
)
REQUEST_ID = parameter(
    "header",
    "X-Request-ID",
    "An id for logs and problems; generated if absent.",
    {"type": "string"},
)


@dataclass(frozen=True)
class Route:
    """One route. The docstring of its endpoint is its summary and its description.

    Attributes:
        endpoint: called with the request and the path parameters; the name of its module is the
            tag, if there is no other.
        verbs: of an access key, each of which allows the route.
        replies: what each status of success means.
        reply: the type of their body; None if it is not one of the API's, or there is none.
        content: schemas of other media types of these replies.
        headers: of these replies.
        parameters: besides those of the path and the request's id, which every route has.
        body: the component of its body.
        problems: its errors besides those that follow from the rest: a body may be malformed.
        is_health: whether it is one of health: it answers in JSON, and probes use HEAD.
        options: further arguments of FastAPI.
    """

    method: str
    path: str
    endpoint: Callable[..., Any]
    verbs: tuple[Verb, ...] = ()
    replies: Mapping[int, str] = field(default_factory=dict)
    reply: Any = None
    content: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, Any] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = ()
    body: str | None = None
    problems: tuple[type[CarryError], ...] = ()
    is_health: bool = False
    tag: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fastapi_routes(self) -> list[APIRoute]:
        """The routes of FastAPI, for any application: it takes milliseconds to make them."""
        extra: dict[str, Any] = {"security": self._security()}
        if not self.is_health:
            extra["parameters"] = [*self.parameters, REQUEST_ID]
        if self.body is not None:
            schema = _reference(self.body)
            content = {media: {"schema": schema} for media in SERVED}
            extra["requestBody"] = {"required": True, "content": content}
        replies: Responses = {code: self._reply(text) for code, text in self.replies.items()}
        problems: Responses = {} if self.is_health else _problems(self._errors())
        summary, _, description = (inspect.getdoc(self.endpoint) or "").partition("\n\n")
        route = DirectRoute(
            self.path,
            self.endpoint,
            methods=[self.method],
            summary=summary.removesuffix("."),
            description=description,
            tags=[self.tag or self.endpoint.__module__.rpartition(".")[2]],
            responses={**replies, **problems, **replies},
            openapi_extra=extra,
            **self.options,
        )
        route.verbs = self.verbs
        if not self.is_health:
            return [route]
        return [
            DirectRoute(self.path, self.endpoint, methods=["HEAD"], include_in_schema=False),
            route,
        ]

    def _security(self) -> list[dict[str, list[str]]]:
        """Each verb alone is enough, and a service without access keys is open."""
        if self.is_health and not self.verbs:
            return []
        return [*({"access_key": [verb.value]} for verb in self.verbs), {}]

    def _reply(self, description: str) -> dict[str, Any]:
        """A response in JSON, for FastAPI to document, and the same in MessagePack."""
        reply: dict[str, Any] = {"description": description}
        content = dict(self.content)
        if self.reply is not None:
            reply["model"] = self.reply
            if not self.is_health:
                content[Media.MSGPACK.value] = {"schema": _reference(self.reply.__name__)}
        if content:
            reply["content"] = content
        if self.headers:
            reply["headers"] = dict(self.headers)
        return reply

    def _errors(self) -> set[type[CarryError]]:
        kinds: set[type[CarryError]] = {*_ANY, *self.problems}
        if self.body is not None:
            kinds.update(_OF_BODY)
        if self.reply is not None:
            kinds.add(errors.NotAcceptable)
        if "{model}" in self.path:
            kinds.add(errors.ModelNotFound)
        if "{stream}" in self.path:
            kinds.add(errors.InvalidName)
        if any(each["name"] == "If-Match" for each in self.parameters):
            kinds.update((errors.InvalidPrecondition, errors.StateChanged))
        return kinds


class DirectRoute(APIRoute):
    """Calls its endpoint with the request and the path parameters, without FastAPI's dependency
    resolution and exit stacks.

    These take 27 us a request with path parameters alone, and 60 us if options and headers were
    declared as well, of the 71 us that a chunk of 16 events takes on the slow path without engine
    and store (docs/decisions/http.md).

    Attributes:
        verbs: of an access key, each of which allows the route.
    """

    verbs: tuple[Verb, ...] = ()

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of a request."""
        endpoint: Callable[..., Coroutine[Any, Any, Response]] = self.endpoint

        async def handle(request: Request) -> Response:
            return await endpoint(request, **request.path_params)

        return handle


def _reference(component: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{component}"}


def _problems(kinds: set[type[CarryError]]) -> Responses:
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
                    "schema": _reference(reply_types.Problem.__name__),
                    "examples": {kind.code: _example(kind) for kind in of_status},
                }
            },
        }
        for status, of_status in sorted(by_status.items())
    }


def _example(kind: type[CarryError]) -> dict[str, Any]:
    return {
        "summary": kind.title,
        "value": {
            "type": f"{REFERENCE}#{kind.code}",
            "title": kind.title,
            "status": STATUS[kind],
            "detail": f"{kind.title}.",
            "code": kind.code,
            "retryable": kind.retryable,
            "request_id": "6f1d0c2e9a7b4853",
        },
    }
