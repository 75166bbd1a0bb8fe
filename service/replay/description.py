"""The model as `GET /v1/models/{model}` describes it: version, event fields, outputs.

The event schema comes back from its JSON Schema without what training fitted, which sending
events does not need. Refused: a model without an event schema, and a description that is not
one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from models.events.schema import EventSchema
from models.spec.layout import Output, OutputSpec
from service.replay.options import ReplayError

_KINDS = {"number": "numeric", "string": "categorical", "boolean": "boolean"}


@dataclass(frozen=True, slots=True)
class Description:
    """What a client knows of a served model.

    Attributes:
        name: its slug.
        version: first 12 digits of its fingerprint.
        schema: its event schema, not fitted.
        outputs: the layout of one step's outputs.
        invisible: outputs do not depend on how events are cut into chunks.
    """

    name: str
    version: str
    schema: EventSchema
    outputs: OutputSpec
    invisible: bool


def read_description(document: Mapping[str, Any]) -> Description:
    """The description out of its document; ReplayError where it is not one."""
    name = str(document.get("name"))
    if document.get("events") is None:
        raise ReplayError(f"model {name!r} takes no events, only `inputs`: nothing to replay")
    try:
        outputs = tuple(
            Output(key, tuple(value["shape"]), tuple(value["labels"]), value["per"])
            for key, value in document["outputs"].items()
        )
        return Description(
            name,
            str(document["version"]),
            _schema(document["events"]),
            OutputSpec(outputs),
            document["chunking"] == "invisible",
        )
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ReplayError(f"the description of model {name!r} cannot be read: {error}") from error


def _schema(events: Mapping[str, Any]) -> EventSchema:
    required = events.get("required", [])
    fields = [
        {"name": name, "kind": _kind(value), "optional": name not in required}
        for name, value in events["properties"].items()
    ]
    return EventSchema.model_validate({"fields": fields})


def _kind(value: Mapping[str, Any]) -> str:
    """The kind of field that a property describes; null among its types only says optional."""
    alternatives = list(_alternatives(value))
    if any(given.get("format") == "date-time" for given in alternatives):
        return "timestamp"
    (kind,) = {str(given["type"]) for given in alternatives if given["type"] != "null"}
    return _KINDS[kind]


def _alternatives(value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "anyOf" not in value:
        yield value
    for given in value.get("anyOf", ()):
        yield from _alternatives(given)
