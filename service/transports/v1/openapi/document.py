"""The OpenAPI document of the models that are served: `/openapi.json`.

The routes are the same for every model, the bodies are not. So the components hold each
model's event, chunk, items and sequences under its name (`flights-Event`), and the bodies of
the routes (`Chunk`, `Many`, `Predict`) are any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from models.events.parse import example_event
from service.codec.media import Media
from service.codec.schema_fields import EXAMPLE_STREAM
from service.pipeline.served_model import ServedModel
from service.transports.v1.context import ApiContext
from service.transports.v1.openapi.body_schemas import (
    BodySchemas,
    ForkBody,
    StateBody,
    build_body_schemas,
)

ACCESS_KEY = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "carry_<id>_<secret>",
    "description": "An access key that `carry keys create` printed, or a token that it signed.",
}
REF_TEMPLATE = "#/components/schemas/{model}"

TAGS = [
    {"name": "chunks", "description": "Send events, get outputs."},
    {"name": "streams", "description": "Look at, forget, restore and fork streams."},
    {"name": "models", "description": "What is served."},
    {"name": "health", "description": "For load balancers and monitoring."},
]
DESCRIPTION = """\
Serves recurrent networks over event streams. Every stream has its own state; events arrive in
chunks of any length, each chunk continues from the state the last one left, and every event
gets its output.

Bodies are JSON or MessagePack (`application/msgpack`), the same members in both, but for
`inputs`: in MessagePack it is one binary string of float32, little-endian, row by row.
Failures are [problem documents](/docs/errors) with a stable `code`.
"""


def openapi_document(
    routes: Sequence[BaseRoute], api: ApiContext, models: Mapping[str, ServedModel]
) -> dict[str, Any]:
    """The whole document of an application's routes, for these models."""
    document = get_openapi(
        title="Carry",
        version=version("carry"),
        summary="Stateful recurrent networks over event streams.",
        description=DESCRIPTION,
        tags=TAGS,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        routes=routes,
    )
    types = {}
    for name in sorted(models):
        limits = api.limits.of_model(models[name].chunk_limit)
        types[name] = build_body_schemas(models[name], limits)
    components = {
        **_with_integer_bounds(document["components"]["schemas"]),
        **_schemas([StateBody, ForkBody]),
        **_schemas([kind for body_types in types.values() for kind in _kinds(body_types)]),
    }
    for body in ("Chunk", "Many", "Predict"):
        references = [_reference(f"{name}-{body}") for name in types]
        components[body] = {"title": body, "anyOf": references}
    forecasts = [name for name, body_types in types.items() if body_types.forecast is not None]
    components["Forecast"] = (
        {"title": "Forecast", "anyOf": [_reference(f"{name}-Forecast") for name in forecasts]}
        if forecasts
        else {"title": "Forecast", "not": {}, "description": "No model has a decoder."}
    )
    document["components"]["schemas"] = dict(sorted(components.items()))
    document["components"]["securitySchemes"] = {"access_key": ACCESS_KEY}
    # the empty requirement: a service without access keys is open
    document["security"] = [{"access_key": []}, {}]
    for path, examples in _examples(models).items():
        content = document["paths"][path]["post"]["requestBody"]["content"]
        content[Media.JSON.value]["examples"] = examples
    return document


def _with_integer_bounds(schema: Any) -> Any:
    """The schema with whole bounds of integers: FastAPI writes every bound as a float, which tools
    reject for an integer, and which is rounded above 2^53."""
    if isinstance(schema, list):
        return [_with_integer_bounds(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    converted = {name: _with_integer_bounds(inner) for name, inner in schema.items()}
    if schema.get("type") == "integer":
        bounds = {"minimum", "maximum"} & schema.keys()
        converted.update({name: int(schema[name]) for name in bounds})
    return converted


def _schemas(kinds: list[type[BaseModel]]) -> dict[str, Any]:
    if not kinds:
        return {}
    _, document = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=REF_TEMPLATE
    )
    by_name: dict[str, Any] = document["$defs"]
    for schema in by_name.values():
        for member in schema.get("properties", {}).values():
            _leave_out_null(member)
    return by_name


def _leave_out_null(member: dict[str, Any]) -> None:
    """An optional member is better left out than null, and reads better without it."""
    kinds = [kind for kind in member.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1 and member.get("default", ...) is None:
        del member["anyOf"], member["default"]
        member.update(kinds[0])


def _reference(model: str) -> dict[str, str]:
    return {"$ref": REF_TEMPLATE.format(model=model)}


def _kinds(types: BodySchemas) -> list[type[BaseModel]]:
    kinds: list[type[BaseModel]] = [types.chunk, types.item, types.many, types.predict]
    return kinds if types.forecast is None else [*kinds, types.forecast]


def _examples(models: Mapping[str, ServedModel]) -> dict[str, dict[str, Any]]:
    chunks: dict[str, Any] = {}
    many: dict[str, Any] = {}
    predict: dict[str, Any] = {}
    for name, served in sorted(models.items()):
        for feed, steps in _steps(served).items():
            title = f"{name}: {feed}"
            chunks[title] = {"value": {"position": 0, feed: steps}}
            item = {"stream": EXAMPLE_STREAM, "position": 0, feed: steps}
            many[title] = {"value": {"chunks": [item]}}
            predict[title] = {"value": {"sequences": [{feed: steps}]}}
    return {
        "/v1/models/{model}/streams/{stream}/chunks": chunks,
        "/v1/models/{model}/chunks": many,
        "/v1/models/{model}/predict": predict,
    }


def _steps(served: ServedModel) -> dict[str, list[Any]]:
    examples: dict[str, list[Any]] = {}
    if served.events is not None:
        examples["events"] = [example_event(served.events)]
    examples["inputs"] = [[0.0] * served.input_features]
    return examples
