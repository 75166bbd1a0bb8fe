"""Reads the entries of topics: from their fields to events, and from events to chunks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import structlog

from models.artifact.artifact import Artifact
from models.spec.stream_name import STREAM_NAME_RULE, is_stream_name
from service.codec.field_rules import MAX_POSITION
from service.codec.media import Media
from service.codec.request_reader import RequestReader
from service.codec.settings import RequestSettings
from service.consumers.config import ConsumerConfig
from service.core.errors import CarryError, InternalError, InvalidInput, InvalidName, MalformedBody
from service.core.values import Chunk, SourceMark, StreamKey
from service.store.source_mark import parse_offset, source_name
from service.store.topics import Entry

MAX_MERGED_EVENTS: Final = 256
"""Most events of a stream that are merged into one chunk."""

ORIGIN_FIELD: Final = b"carry-origin"
"""The field of an entry with the place that it was moved from: of a record of Kafka
`topic:partition:offset`, of an entry of another topic `topic:id`."""

log = structlog.get_logger(__name__)

_IS_INTEGER: Final = re.compile(rb"\d{1,19}").fullmatch
_IS_CONSTANT: Final = re.compile(rb"-?\d.*|true|false|null").fullmatch
_read_json: Final = msgspec.json.Decoder(msgspec.Raw).decode
_encode_json: Final = msgspec.json.Encoder().encode


class Event(msgspec.Struct, eq=False):
    """An event of an entry.

    Attributes:
        value: the event, one complete value of JSON.
        position: in its stream; None to append it.
        fields: of its entry.
        is_alone: whether it is processed in a chunk of its own, since a chunk with it failed.
    """

    id: bytes
    stream: str
    value: msgspec.Raw
    position: int | None
    fields: Sequence[bytes]
    is_alone: bool = False


class StreamNames:
    """Reads the names of the streams of entries.

    Attributes:
        field: the field with the name; empty if all entries are of one stream.
    """

    def __init__(self, config: ConsumerConfig):
        self._constant = config.constant_stream
        self.field = (config.stream_field or "").encode()

    def read(self, values: Mapping[bytes, bytes]) -> str:
        """The name of the stream of an entry with these fields.

        Raises:
            InvalidInput, InvalidName: naming the field.
        """
        if self._constant is not None:
            return self._constant
        name = values.get(self.field)
        if name is None:
            raise _missing(self.field, values)
        stream = name.decode("latin-1")
        if not is_stream_name(stream):
            place = self.field.decode()
            raise InvalidName(f"{place}: expected {STREAM_NAME_RULE}, got {stream[:300]!r}")
        return stream


class EventReader:
    """Reads the entries of a topic for one model.

    Attributes:
        max_events: most events of a chunk; 1 unless the model's chunking is `invisible`.
    """

    def __init__(self, artifact: Artifact, config: ConsumerConfig, settings: RequestSettings):
        self._reader = RequestReader(artifact, settings)
        self._reader.check_accepts_chunks()
        self._names = StreamNames(config)
        self._event = _bytes_of(config.event.field)
        self._position = _bytes_of(config.position)
        self._is_json = config.event.format == "json"
        self._source = source_name(config.source)
        self._is_kafka = config.kafka_source is not None
        schema = artifact.spec.events
        fields = () if schema is None else schema.fields
        self._texts = {each.name.encode() for each in fields if each.kind == "categorical"}
        invisible = artifact.spec.chunking == "invisible"
        self.max_events = min(MAX_MERGED_EVENTS, self._reader.limits.chunk.steps)
        if not invisible:
            self.max_events = 1

    def key(self, stream: str) -> StreamKey:
        """The key of a stream of the model."""
        return self._reader.key(stream)

    def stream(self, fields: Sequence[bytes]) -> str | None:
        """The name of an entry's stream; None if it names none that is allowed."""
        try:
            return self._names.read(dict(zip(fields[::2], fields[1::2], strict=False)))
        except CarryError:
            return None

    def read(self, entry: Entry) -> Event:
        """Read an entry.

        Raises:
            InvalidName, InvalidInput, MalformedBody: naming the field.
            InternalError: a defect, which is logged.
        """
        try:
            return self._read(entry)
        except CarryError:
            raise
        except Exception as error:
            log.exception("entry_failed", entry=entry.id.decode())
            raise InternalError(f"the entry could not be read: {type(error).__name__}") from error

    def _read(self, entry: Entry) -> Event:
        fields = entry.fields or ()
        values = dict(zip(fields[::2], fields[1::2], strict=False))
        stream = self._names.read(values)
        position = None
        if self._position is not None and (digits := values.get(self._position)) is not None:
            position = _parse_position(self._position, digits)
        return Event(entry.id, stream, self._value(values), position, fields)

    def _value(self, values: Mapping[bytes, bytes]) -> msgspec.Raw:
        if self._event is None:
            names = (self._names.field, self._position, ORIGIN_FIELD)
            flat = {
                _decode(name): _flat_value(value, is_text=name in self._texts)
                for name, value in values.items()
                if name not in names
            }
            return msgspec.Raw(_encode_json(flat))
        value = values.get(self._event)
        if value is None:
            raise _missing(self._event, values)
        try:
            return read_document(value, is_json=self._is_json)
        except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
            kind = "JSON" if self._is_json else "MessagePack"
            place = self._event.decode()
            raise MalformedBody(f"{place}: expected one {kind} document: {error}") from error

    def find_mark(self, event: Event) -> SourceMark:
        """Find the source mark of an event; of no source if its origin cannot be read."""
        fields = dict(zip(event.fields[::2], event.fields[1::2], strict=False))
        origin = fields.get(ORIGIN_FIELD, b"").decode("utf-8", "replace")
        if not self._is_kafka and not origin.startswith(f"{self._source}:"):
            return SourceMark(self._source, *parse_offset(event.id.decode()))
        topic, _, offset = origin.rpartition(":")
        try:
            numbers = parse_offset(offset)
            if self._is_kafka:
                topic, _, partition = topic.rpartition(":")
                topic = source_name(topic, int(partition))
        except ValueError:
            return SourceMark("", 0)
        return SourceMark(topic, *numbers)

    def chunk(self, events: Sequence[Event]) -> Chunk:
        """Make the chunk of consecutive events of one stream.

        Raises:
            BadRequest: one of them is invalid.
            InternalError: a defect, which is logged.
        """
        first = events[0]
        is_row = memoryview(first.value)[0] == ord("[")
        body: dict[str, Any] = {"inputs" if is_row else "events": [each.value for each in events]}
        if first.position is not None:
            body["position"] = first.position
        key = self._reader.key(first.stream)
        try:
            return self._reader.chunk(_encode_json(body), Media.JSON, key)
        except CarryError:
            raise
        except Exception as error:
            log.exception("chunk_failed", stream=first.stream, entry=first.id.decode())
            raise InternalError(f"no chunk could be made: {type(error).__name__}") from error


def _bytes_of(name: str | None) -> bytes | None:
    return None if name is None else name.encode()


def read_document(value: bytes, *, is_json: bool) -> msgspec.Raw:
    """Read one complete JSON value, which can be embedded in another document; MessagePack is
    converted to JSON, where bytes are a row of float32 values.

    Raises:
        msgspec.DecodeError, ValueError, TypeError, RecursionError: it is not one document.
    """
    if is_json:
        return _read_json(value)
    decoded = msgspec.msgpack.decode(value)
    if isinstance(decoded, bytes):
        if len(decoded) % 4:
            raise ValueError(f"expected 4 bytes for each float32 value, got {len(decoded)} bytes")
        decoded = np.frombuffer(decoded, "<f4").tolist()
    return msgspec.Raw(_encode_json(decoded))


def _flat_value(value: bytes, *, is_text: bool) -> Any:
    """The value of a flat field: a number, true, false or null, or a string."""
    if not is_text and _IS_CONSTANT(value):
        try:
            return msgspec.json.decode(value)
        except msgspec.DecodeError:
            pass
    return _decode(value)


def _decode(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise MalformedBody(f"expected fields in UTF-8, got {value[:100]!r}") from error


def _parse_position(name: bytes, digits: bytes) -> int:
    if not _IS_INTEGER(digits) or int(digits) > MAX_POSITION:
        place = name.decode()
        got = digits[:100].decode("utf-8", "backslashreplace")
        raise InvalidInput(
            f"{place}: expected an integer from 0 to {MAX_POSITION}, got {got!r}", at=place
        )
    return int(digits)


def _missing(name: bytes | None, values: Mapping[bytes, bytes]) -> InvalidInput:
    place = (name or b"").decode()
    names = ", ".join(each.decode("utf-8", "replace") for each in [*values][:20]) or "none"
    return InvalidInput(f"{place}: expected this field, got the fields {names}", at=place)
