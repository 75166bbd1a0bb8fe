"""One route of the API: how it is served, and what the OpenAPI document says of it.

Starlette matches requests to routes, and `Call` reads what a request says. FastAPI's routes would
use the first of several If-Match lines and the last of duplicate query parameters, ignore unknown
ones, and take 27 to 60 us a request, of the 71 us that a chunk of 16 events takes on the slow path
without engine and store (docs/decisions/http.md).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from starlette import routing
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from models.spec.stream_name import STREAM_NAME
from service.access.caller import Verb
from service.codec.media import SERVED
from service.codec.reply_types import EXAMPLE_STREAM, EXAMPLE_VERSION
from service.transports.v1.call import Call

Parameter = dict[str, Any]
"""A parameter as in the OpenAPI document."""

Endpoint = Callable[[Any], Coroutine[Any, Any, Response]]


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


PROBLEMS: Final = {
    "4XX": {"$ref": "#/components/responses/Rejected"},
    "5XX": {"$ref": "#/components/responses/Failed"},
}
"""The responses with a problem document, which every route may have."""

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
    parameter(
        "path",
        "version",
        "The version's label, or the first digits of its fingerprint.",
        {"type": "string", "examples": [EXAMPLE_VERSION]},
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


class NamedRoute(routing.Route):
    """A route that is put in the scope of its requests, so that their log lines name it."""

    def matches(self, scope: Scope) -> tuple[routing.Match, Scope]:
        """Match a request, and put the route in its scope."""
        match, child_scope = super().matches(scope)
        child_scope["route"] = self
        return match, child_scope


@dataclass(eq=False, repr=False)
class Route(NamedRoute):
    """One route. The docstring of its endpoint is its summary and its description.

    Attributes:
        answer: the endpoint, called with the `Call`, or with the request if the path names no
            model; the name of its module is the tag, if there is no other.
        verbs: of an access key, each of which allows the route.
        replies: what each status of success means.
        reply: the type of their body; None if it is not one of the API's, or there is none.
        content: schemas of other media types of these replies.
        headers: of these replies.
        parameters: besides those of the path and the request's id, which every route has.
        body: the component of its body.
        body_required: whether an empty body is malformed.
        is_health: whether it is one of health: it answers in JSON, and probes use HEAD.
    """

    method: str
    path: str
    answer: Endpoint
    verbs: tuple[Verb, ...] = ()
    replies: Mapping[int, str] = field(default_factory=dict)
    reply: Any = None
    content: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, Any] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = ()
    body: str | None = None
    body_required: bool = True
    is_health: bool = False
    tag: str = ""

    def __post_init__(self) -> None:
        endpoint = self._answer_call if "{model}" in self.path else self.answer
        super().__init__(self.path, endpoint)
        self.methods = {self.method, "HEAD"} if self.is_health else {self.method}
        self.query_names = [each["name"] for each in self.parameters if each["in"] == "query"]
        self.header_names = {each["name"] for each in self.parameters if each["in"] == "header"}

    async def _answer_call(self, request: Request) -> Response:
        return await self.answer(Call(request, self))

    def describe(self) -> dict[str, Any]:
        """The operation in the API document."""
        name, module = self.answer.__name__, self.answer.__module__
        summary, _, description = (inspect.getdoc(self.answer) or "").partition("\n\n")
        operation: dict[str, Any] = {
            "tags": [self.tag or module.rpartition(".")[2]],
            "summary": summary.removesuffix("."),
            "description": description,
            "operationId": re.sub(r"\W", "_", f"{name}{self.path}_{self.method.lower()}"),
            "security": _security(self.verbs, is_health=self.is_health),
            "responses": {str(status): self._reply(text) for status, text in self.replies.items()},
        }
        if self.body is not None:
            content = {media: {"schema": _reference(self.body)} for media in SERVED}
            operation["requestBody"] = {"required": self.body_required, "content": content}
        if not self.is_health:
            of_path = [each for each in _OF_PATH if f"{{{each['name']}}}" in self.path]
            operation["parameters"] = [*of_path, *self.parameters, _REQUEST_ID]
            operation["responses"] |= PROBLEMS
        return operation

    def _reply(self, description: str) -> dict[str, Any]:
        """A response, in JSON and in MessagePack."""
        content = dict(self.content)
        if self.reply is not None:
            schema = {"schema": _reference(self.reply.__name__)}
            content |= dict.fromkeys(SERVED[:1] if self.is_health else SERVED, schema)
        reply: dict[str, Any] = {"description": description}
        if content:
            reply["content"] = content
        if self.headers:
            reply["headers"] = self.headers
        return reply


def _security(verbs: Iterable[Verb], *, is_health: bool) -> list[dict[str, list[str]]]:
    """Security requirements of an operation: any one verb, or none in a service without keys."""
    allowed = [{"access_key": [verb.value]} for verb in verbs]
    return [] if is_health and not allowed else [*allowed, {}]


def _reference(component: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{component}"}
