"""The OpenAPI document of the models that are served: `/openapi.json`.

The routes are the same for every model, the bodies are not. So the components hold each model's
event, chunk, items and sequences under its name (`flights-Event`), and the bodies of the routes
(`Chunk`, `Many`, `Predict`) are any of them. Replies are described by their types, and bodies by
the types that decode them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import msgspec
from pydantic import TypeAdapter
from starlette.routing import BaseRoute

from models.events.parse import event_json_schema, example_event
from service.codec.body_types import (
    AcknowledgeBody,
    AliasBody,
    ForkBody,
    RewindBody,
    StateBody,
    VersionBody,
    known_future_schema,
)
from service.codec.media import Media
from service.codec.reply_types import EXAMPLE_STREAM
from service.core.errors import leaf_errors
from service.pipeline.served_model import ServedModel
from service.transports.v1.context import ApiContext
from service.transports.v1.problems import PROBLEM_JSON, problem
from service.transports.v1.reply_types import Problem
from service.transports.v1.route import Route

ACCESS_KEY = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "carry_<id>_<secret>",
    "description": "An access key that `carry keys create` printed, or a token that it signed.",
}
SCHEMAS = "#/components/schemas/"

RETRY_AFTER = {
    "description": "Seconds to wait before the same request is sent again, if it may be.",
    "schema": {"type": "integer", "minimum": 1},
}

TAGS = [
    {"name": "chunks", "description": "Send events, get outputs."},
    {"name": "streams", "description": "Look at, forget, restore, fork and rewind streams."},
    {"name": "models", "description": "What is served."},
    {"name": "versions", "description": "Load versions of a model, and say which answers."},
    {"name": "health", "description": "For load balancers and monitoring."},
]
INFO = {
    "title": "Carry",
    "summary": "Stateful recurrent networks over event streams.",
    "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
    "description": """\
Serves recurrent networks over event streams. Every stream has its own state; events arrive in
chunks of any length, each chunk continues from the state the last one left, and every event
gets its output.

Bodies are JSON or MessagePack (`application/msgpack`), the same members in both, but for
`inputs`: in MessagePack it is one binary string of float32, little-endian, row by row.
Failures are [problem documents](/docs/errors) with a stable `code`.
""",
}
_ONE_FEED = ("Chunk", "Item", "Sequence")
"""Bodies that have either events or inputs."""


def openapi_document(
    routes: Sequence[BaseRoute], api: ApiContext, models: Mapping[str, ServedModel]
) -> dict[str, Any]:
    """The whole document of an application's routes, for these models."""
    described = [route for route in routes if isinstance(route, Route)]
    paths: dict[str, Any] = {}
    for route in described:
        paths.setdefault(route.path, {})[route.method.lower()] = route.describe()
    kinds = {route.reply for route in described} - {None}
    _, replies = TypeAdapter.json_schemas(
        [(kind, "serialization", TypeAdapter(kind)) for kind in [*kinds, Problem]],
        ref_template=f"{SCHEMAS}{{model}}",
    )
    components: dict[str, Any] = replies["$defs"]
    components |= _schemas(
        [AcknowledgeBody, AliasBody, ForkBody, RewindBody, StateBody, VersionBody], ""
    )
    for name in sorted(models):
        components |= _model_schemas(api, models[name])
    for body in ("Chunk", "Many", "Predict", "Forecast"):
        named = [f"{name}-{body}" for name in sorted(models)]
        references = [{"$ref": SCHEMAS + name} for name in named if name in components]
        components[body] = {"title": body, "anyOf": references}
    if not components["Forecast"]["anyOf"]:
        no_model = {"not": {}, "description": "No model has a decoder."}
        components["Forecast"] = {"title": "Forecast", **no_model}
    for path, examples in _examples(models).items():
        content = paths[path]["post"]["requestBody"]["content"]
        content[Media.JSON.value]["examples"] = examples
    return {
        "openapi": "3.1.0",
        "info": INFO | {"version": version("carry")},
        "tags": TAGS,
        # the empty requirement: a service without access keys is open
        "security": [{"access_key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(components.items())),
            "responses": {
                "Rejected": _problem_response("The request is rejected", range(400, 500)),
                "Failed": _problem_response("The service failed", range(500, 600)),
            },
            "securitySchemes": {"access_key": ACCESS_KEY},
        },
    }


def _problem_response(description: str, statuses: range) -> dict[str, Any]:
    """The response with a problem document, with an example of each code of these statuses."""
    examples = {
        kind.code: {
            "summary": f"{kind.status}: {kind.title}",
            "value": problem(kind(f"{kind.title}."), "6f1d0c2e9a7b4853"),
        }
        for kind in leaf_errors()
        if kind.status in statuses
    }
    schema = {"$ref": f"{SCHEMAS}Problem"}
    return {
        "description": f"{description}: `code` says why, and `/docs/errors` what to do.",
        "headers": {"Retry-After": RETRY_AFTER},
        "content": {PROBLEM_JSON: {"schema": schema, "examples": examples}},
    }


def _model_schemas(api: ApiContext, served: ServedModel) -> dict[str, Any]:
    """The components of one model's bodies."""
    reader, lead = api.codecs[served.name].reader, f"{served.name}-"
    types = reader.types[Media.JSON]
    components = _schemas([types.chunk, types.item, types.items, types.predict], lead)
    feeds = ["inputs"] if served.events is None else ["events", "inputs"]
    has_blocks = served.spec.blocks is not None
    for name in _ONE_FEED:
        body = components[lead + name]
        body["oneOf"] = [{"required": [feed]} for feed in feeds]
        if served.events is None:
            del body["properties"]["events"]
        for feed in feeds:
            # a final chunk of a model with blocks may be empty
            body["properties"][feed]["minItems"] = 1 if name == "Sequence" or not has_blocks else 0
    if served.events is not None:
        components[f"{lead}Event"] = event_json_schema(served.events, f"{lead}Event")
    if types.forecast is None:
        return components
    decoder = served.require_decoder()
    forecast = _schemas([types.forecast], lead)[f"{lead}Forecast"]
    members = forecast["properties"]
    members["horizon"]["maximum"] = decoder.max_horizon
    members["samples"]["maximum"] = reader.limits.samples
    if (future := known_future_schema(served.spec)) is not None:
        name = f"{lead}Coming"
        components[name] = event_json_schema(future, name, marks_resets=False)
        members["future"]["items"] = {"$ref": SCHEMAS + name}
    return {**components, f"{lead}Forecast": forecast}


def _schemas(kinds: Sequence[type[msgspec.Struct]], lead: str) -> dict[str, Any]:
    """The components that describe types of bodies, by name with a prefix."""
    _, described = msgspec.json.schema_components(kinds, ref_template=f"{SCHEMAS}{lead}{{name}}")
    for name, schema in described.items():
        schema["title"] = lead + name
        for member in schema["properties"].values():
            _leave_out_null(member)
            if "pattern" in member:
                member["pattern"] = member["pattern"].replace(r"\Z", "$")
    return {lead + name: schema for name, schema in described.items()}


def _leave_out_null(member: dict[str, Any]) -> None:
    """An optional member is better left out than null, and reads better without it."""
    kinds = [kind for kind in member.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1 and member.get("default", ...) is None:
        del member["anyOf"], member["default"]
        member.update(kinds[0])


def _examples(models: Mapping[str, ServedModel]) -> dict[str, dict[str, Any]]:
    chunks: dict[str, Any] = {}
    many: dict[str, Any] = {}
    predict: dict[str, Any] = {}
    for name, served in sorted(models.items()):
        steps: dict[str, Any] = {}
        if served.events is not None:
            steps["events"] = [example_event(served.events)]
        steps["inputs"] = [[0.0] * served.input_features]
        for feed, values in steps.items():
            title = f"{name}: {feed}"
            chunks[title] = {"value": {"position": 0, feed: values}}
            item = {"stream": EXAMPLE_STREAM, "position": 0, feed: values}
            many[title] = {"value": {"chunks": [item]}}
            predict[title] = {"value": {"sequences": [{feed: values}]}}
    return {
        "/v1/models/{model}/streams/{stream}/chunks": chunks,
        "/v1/models/{model}/chunks": many,
        "/v1/models/{model}/predict": predict,
    }
