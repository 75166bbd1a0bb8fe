"""The paths of a request through the readers of every transport, and what an oracle says of it.

The oracle is plain Python, which shares no code with the readers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import ormsgpack
from msgspec.structs import astuple
from pydantic import TypeAdapter, ValidationError

from models.artifact.artifact import Artifact
from service.access.caller import ANYONE
from service.codec.media import Media
from service.codec.request_reader import RequestReader
from service.codec.settings import RequestSettings
from service.core.delivery import chunk_digest
from service.core.errors import CarryError
from service.core.values import Chunk, Feed, SequenceInput, Steps
from service.pipeline.served_model import ServedModel
from service.transports.v1.context import ModelCodec
from service.transports.v2.http_body import decode_request
from service.transports.v2.inference import Inference
from service.transports.v2.parameters import parse_parameters
from service.transports.v2.request import InferRequest
from service.transports.v2.tensors import InputTensor
from tests.service.transports.v1.harness import EVENT
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.strict_events import columns_from_events, event_adapter
from tests.support.v2_messages import message_class

LIMITS = RequestSettings(max_chunk_steps=4, max_predict_steps=6, max_items=3)
NONCE = b"n" * 16
EPOCH = "0123456789abcdef"


class Wrong(NamedTuple):
    """What the oracle says of a wrong request: the codes and places that its error may have."""

    codes: frozenset[str]
    places: frozenset[str]


def codec_of(artifact: Artifact, limits: RequestSettings = LIMITS) -> ModelCodec:
    codec = ModelCodec(ServedModel(artifact, NumpyRuntime(artifact)), limits)
    codec.reader = RequestReader(artifact, limits, lambda: NONCE)
    return codec


# The oracle.


def is_whole(value: Any, most: int = 2**63 - 1) -> bool:
    return type(value) is int and 0 <= value <= most


def expected(codec: ModelCodec, body: Mapping[str, Any]) -> Chunk | Wrong:
    """What a body means: each rule of the reference, in plain Python."""
    codes, places = set[str](), set[str]()

    def wrong(place: str, code: str = "invalid_input") -> None:
        codes.add(code)
        places.add(place)

    known = {"events", "inputs", "resets", "false_alarms_per_day"}
    for name in body.keys() - known - {"position", "epoch", "final", "dry_run"}:
        wrong(name)
    position, epoch = body.get("position"), body.get("epoch")
    if position is not None and not is_whole(position):
        wrong("position")
    if epoch is not None and not (type(epoch) is str and re.fullmatch("[0-9a-f]{16}", epoch)):
        wrong("epoch")
    for name in ("final", "dry_run"):
        if type(body.get(name, False)) is not bool:
            wrong(name)
    if body.get("final") is True:
        wrong("final", "final_unsupported")
    if body.get("false_alarms_per_day") is not None:
        wrong("false_alarms_per_day")  # neither model has alarms
    events, inputs = body.get("events"), body.get("inputs")
    if (events is None) == (inputs is None):
        wrong("body")
    steps, marks = None, list[int]()
    if events is not None:
        steps, marks = oracle_events(codec, events, wrong)
    if inputs is not None:
        steps = oracle_rows(codec, inputs, wrong)
    resets = body.get("resets")
    if resets is not None:
        if type(resets) is not list:
            wrong("resets")
        else:
            if len(resets) > LIMITS.max_chunk_steps:
                wrong("resets")
            length = 0 if steps is None else steps.length
            for at, reset in enumerate(resets):
                before = resets[at - 1] if at else -1
                fits = is_whole(reset) and is_whole(before + 1) and before < reset < length
                if not fits:
                    wrong(f"resets[{at}]")
    if codes or steps is None:
        return Wrong(frozenset(codes), frozenset(places))
    merged = tuple(sorted({*marks, *(resets or [])}))
    steps = Steps(steps.feed, steps.length, steps.columns, steps.rows, merged)
    nonce = NONCE if position is None else b""
    digest = chunk_digest(codec.served.events, steps, nonce, final=False)
    return Chunk(
        codec.reader.key("s"),
        steps,
        digest,
        position,
        None if epoch is None else bytes.fromhex(epoch),
        dry_run=body.get("dry_run", False),
    )


Report = Callable[..., None]


def oracle_rows(codec: ModelCodec, inputs: Any, wrong: Report) -> Steps | None:
    wide = codec.served.input_features
    if type(inputs) is not list:
        wrong("inputs")
        return None
    if not inputs or len(inputs) > LIMITS.max_chunk_steps:
        wrong("inputs", "chunk_too_long" if inputs else "invalid_input")
    for at, row in enumerate(inputs):
        if type(row) is not list or len(row) != wide:
            wrong(f"inputs[{at}]")
            if type(row) is not list:
                continue
        for column, value in enumerate(row):
            is_number = type(value) in (int, float)
            with np.errstate(over="ignore"):
                fits = is_number and bool(np.isfinite(np.float32(float(value))))
            codes = codec.served.spec.columns[column].codes if column < wide else None
            if codes is not None:
                fits = fits and value == int(value) and 0 <= value < codes
            if not fits:
                wrong(f"inputs[{at}][{column}]")
    try:
        with np.errstate(over="ignore"):
            values = np.array(inputs, np.float64).astype("<f4")
        return Steps(Feed.INPUTS, len(inputs), rows=values)
    except (ValueError, TypeError, OverflowError):
        return None


def oracle_events(codec: ModelCodec, events: Any, wrong: Report) -> tuple[Steps | None, list[int]]:
    schema, marks, valid = codec.served.events, list[int](), list[Any]()
    if schema is None or type(events) is not list:
        wrong("events")
        return None, marks
    if not events or len(events) > LIMITS.max_chunk_steps:
        wrong("events", "chunk_too_long" if events else "invalid_input")
    adapter: TypeAdapter[Any] = event_adapter(schema)
    for at, event in enumerate(events):
        if type(event) is not dict:
            wrong(f"events[{at}]")
            continue
        mark = event.get("reset", False)
        if type(mark) is not bool:
            wrong(f"events[{at}].reset")
        elif mark:
            marks.append(at)
        try:
            members = {name: value for name, value in event.items() if name != "reset"}
            valid.append(adapter.validate_python(members))
        except ValidationError as error:
            for each in error.errors():
                wrong(f"events[{at}].{each['loc'][0]}")
    if len(valid) < len(events):
        return None, marks
    return Steps(Feed.EVENTS, len(events), columns=columns_from_events(schema, valid)), marks


# The paths.


def shown(value: Any) -> Any:
    """A value whose equality is that of all that a pipeline or a client would see."""
    if isinstance(value, CarryError):
        return value.code, dict(value.facts)
    if isinstance(value, SequenceInput):
        return shown(value.steps), value.token
    if isinstance(value, Chunk):
        members = [member for member in astuple(value) if member is not value.steps]
        return (*map(str, members), shown(value.steps))
    if isinstance(value, Steps):
        content: Any = value.rows
        if content is not None:
            content = (content.dtype.str, content.shape, (content + 0.0).tobytes())
        elif value.columns is not None:
            content = {
                name: (array.tolist(), value.columns.present[name].tolist())
                for name, array in value.columns.values.items()
            }
        return value.feed, value.length, content, value.resets, value.false_alarms_per_day
    return [shown(item) for item in value]


def result(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except CarryError as error:
        return error


def read_chunk(codec: ModelCodec, body: bytes, media: Media = Media.JSON) -> Any:
    return result(lambda: codec.reader.chunk(body, media, codec.reader.key("s")))


def in_frame(codec: ModelCodec, body: Mapping[str, Any]) -> Any:
    frame = codec.reader.frame(dumps({"id": 7, **body}), Media.JSON, "s")
    assert (frame.id, frame.stream) == (7, "s")
    return frame.result


def as_item(codec: ModelCodec, body: Mapping[str, Any]) -> Any:
    # both are read together if they are valid, and of one feed
    other: dict[str, Any] = {"stream": "other", "inputs": [[0.0] * codec.served.input_features]}
    if body.get("events") is not None and codec.served.events is not None:
        other = {"stream": "other", "events": [EVENT]}
    many = dumps({"chunks": [other, {"stream": "s", **body}]})
    found = result(lambda: codec.reader.items(many, Media.JSON))
    assert isinstance(found, list), found
    assert isinstance(found[0], Chunk)
    if isinstance(found[1], CarryError):
        found[1].facts = without_prefix(found[1].facts, "chunks[1]")
    return found[1]


def without_prefix(facts: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    at = facts["at"].removeprefix(prefix).removeprefix(".") or "body"
    return {**facts, "at": at}


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


def unusual(body: Mapping[str, Any]) -> bytes:
    """JSON that simdjson does not get: a name is escaped, or a member comes twice."""
    text = json.dumps(body).replace('"inputs"', '"\\u0069nputs"')
    return (('{"position": "earlier", ' + text[1:]) if "position" in body else text).encode()


def packed(body: Mapping[str, Any], wide: int) -> bytes | None:
    """MessagePack; None for values that it cannot hold, and rows that are not rectangular."""
    found = dict(body)
    if found.get("inputs") is not None:
        if type(found["inputs"]) is not list:
            return None
        try:
            with np.errstate(over="ignore"):
                values = np.array(found["inputs"], np.float64).astype("<f4")
        except (ValueError, TypeError, OverflowError):
            return None
        flat = [value for row in found["inputs"] if type(row) is list for value in row]
        if values.ndim != 2 or values.shape[1] != wide or not set(map(type, flat)) <= {int, float}:
            return None
        found["inputs"] = values.tobytes()
    try:
        return ormsgpack.packb(found)
    except TypeError:
        return None


V2_MEMBERS = {"events", "inputs", "position", "epoch", "resets", "dry_run"}


def by_v2(codec: ModelCodec, body: Mapping[str, Any]) -> dict[str, Any]:
    """The results of V2's paths; none for what its requests cannot say."""
    steps = body.get("inputs") or body.get("events")
    feed = "inputs" if body.get("inputs") else "events"
    is_usual = set(body) <= V2_MEMBERS and type(steps) is list and None not in body.values()
    if not is_usual or len({"events", "inputs"} & set(body)) != 1:
        return {}
    resets, position, epoch = [body.get(name) for name in ("resets", "position", "epoch")]
    length, wide = len(steps), codec.served.input_features
    indexes = [] if resets is None else resets
    if type(indexes) is not list or not set(map(type, indexes)) <= {int}:
        return {}
    if sorted(set(indexes)) != indexes or not set(indexes) <= {*range(length)}:
        return {}
    if not is_whole(position or 0) or type(epoch or "") is not str:
        return {}
    if type(body.get("dry_run", True)) is not bool or type(position) is bool:
        return {}
    parameters = {"sequence_id": "s"} | {
        name: body[name] for name in ("position", "epoch", "dry_run") if name in body
    }
    if feed == "inputs":
        is_flat = all(type(row) is list and len(row) == wide for row in steps)
        numbers = is_flat and all(type(value) in (int, float) for row in steps for value in row)
        if not numbers:
            return {}
        with np.errstate(over="ignore"):
            binary = np.array(steps, np.float64).astype("<f4").tobytes()
        tensor = {"name": "inputs", "datatype": "FP32", "shape": [length, wide]}
        data: Any = steps
    else:
        if not all(type(event) is dict for event in steps):
            return {}
        elements = [dumps(event) for event in steps]
        binary = b"".join([len(each).to_bytes(4, "little") + each for each in elements])
        tensor = {"name": "events", "datatype": "BYTES", "shape": [length]}
        data = [each.decode() for each in elements]
    marks = [at in indexes for at in range(length)]
    reset = {"name": "reset", "datatype": "BOOL", "shape": [length], "data": marks}
    others = [reset] if "resets" in body else []
    model = codec.served.name
    text = dumps({"inputs": [{**tensor, "data": data}, *others], "parameters": parameters})
    sized = {**tensor, "parameters": {"binary_data_size": len(binary)}}
    head = dumps({"inputs": [sized, *others], "parameters": parameters})
    message = message_class("ModelInferRequest")()
    contents = message.inputs.add().contents
    if feed == "inputs":
        contents.fp32_contents.extend(np.frombuffer(binary, "<f4").tolist())
        values = contents.fp32_contents
    else:
        contents.bytes_contents.extend(elements)
        values = contents.bytes_contents
    tensors = [InputTensor(tensor["name"], tensor["datatype"], tuple(tensor["shape"]), values)]
    tensors += [InputTensor("reset", "BOOL", (length,), bytes(marks))] if others else []
    pipeline = SimpleNamespace(
        model=lambda *of: codec.served, aliases=SimpleNamespace(on_switch=[])
    )
    api: Any = SimpleNamespace(codecs={codec.served.name: codec}, limits=LIMITS, pipeline=pipeline)
    inference = Inference(api)
    requests = {
        "V2 JSON": lambda: decode_request(text, None, model, ""),
        "V2 binary": lambda: decode_request(head + binary, len(head), model, ""),
        "gRPC": lambda: InferRequest(model, tensors, parse_parameters(parameters)),
    }
    return {
        name: result(lambda make=make: inference.read(ANYONE, make(), math.inf).work)  # type: ignore[misc]
        for name, make in requests.items()
    }


def check(name: str, found: Any, wanted: Chunk | Wrong) -> None:
    if isinstance(wanted, Chunk):
        assert shown(found) == shown(wanted), name
    else:
        assert isinstance(found, CarryError), name
        assert found.code in wanted.codes, (name, found.facts)
        at = found.facts["at"]
        assert at.removeprefix("parameters.") in wanted.places, (name, found.facts)
        assert found.facts.get("stream") == "s" or at.startswith("parameters."), name
