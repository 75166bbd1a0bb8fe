"""Random events for load, generated in advance, and the tags of the streams that consume them.

Every chunk is cut from a feed of thousands of events. A feed also gives the canonical bytes of a
chunk by the protocol's reference, so that a client computes each tag of a stream for itself.
"""

import struct
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import orjson

from carry_client import Field, ModelDescription

FIRST_MS = 1_356_998_400_000
GAP_MS = 61_000
ABSENT_SHARE = 0.2
MIN_LENGTH = 4096
NUMBER_BYTES, FIELD_BYTES = 12, 80
"""Upper estimates of a number, and of a field with its name, in a body."""
BODY_SHARE = 0.8  # how full a body may be by its estimate
FIRST_TAG = bytes(16)
DTYPES = {"numeric": "<f8", "boolean": "u1", "timestamp": "<i8"}


class Chunk(NamedTuple):
    """Consecutive events of one stream."""

    offset: int  # of the first event in the feed
    steps: int  # T, the number of events
    sent: int  # events of the stream before it, from which its timestamps follow

    def times_ms(self) -> range:
        """Timestamps of the events, epoch milliseconds."""
        first_ms = FIRST_MS + self.sent * GAP_MS
        return range(first_ms, first_ms + self.steps * GAP_MS, GAP_MS)

    @property
    def part(self) -> slice:
        """Its events in the feed."""
        return slice(self.offset, self.offset + self.steps)


class InputsFeed:
    """Rows of encoded values: codes drawn evenly, other columns from a normal distribution."""

    member = "inputs"  # of a body

    def __init__(self, model: ModelDescription, length: int, seed: int):
        random = np.random.default_rng(seed)
        rows = random.normal(size=(length, len(model.codes))).round(4)
        for column, codes in enumerate(model.codes):
            if codes:
                rows[:, column] = random.integers(0, codes, length)
        self._rows = rows.astype("<f4")
        self._events = rows.tolist()
        self.length = length
        self.event_bytes = len(orjson.dumps(self._events)) // length + 1  # estimated, in a body

    def events(self, chunk: Chunk) -> list[Any]:
        """The events as a body holds them."""
        return self._events[chunk.part]

    def canonical(self, chunk: Chunk) -> bytes:
        """The events in canonical bytes."""
        return self._rows[chunk.part].tobytes()


class EventsFeed:
    """Events under the model's schema; one optional field in five is absent."""

    member = "events"

    def __init__(self, model: ModelDescription, length: int, seed: int):
        random = np.random.default_rng(seed)
        self.length, self._fields = length, model.fields or ()
        self._times = [field.name for field in self._fields if field.kind == "timestamp"]
        self._events: list[dict[str, Any]] = [{} for _ in range(length)]
        for field in self._fields:
            if field.kind == "timestamp":
                continue
            is_present = random.random(length) >= ABSENT_SHARE * field.is_optional
            for event, value, has_it in zip(
                self._events, _values(field, length, random), is_present, strict=True
            ):
                if has_it:
                    event[field.name] = value
        self.event_bytes = len(orjson.dumps(self._events)) // length + 40 * len(self._times)

    def events(self, chunk: Chunk) -> list[Any]:
        """The events as a body holds them."""
        events = zip(self._events[chunk.part], chunk.times_ms(), strict=True)
        return [{**event, **dict.fromkeys(self._times, time_ms)} for event, time_ms in events]

    def canonical(self, chunk: Chunk) -> bytes:
        """The events in canonical bytes: by field, which are present, then their values."""
        columns, events = [], self.events(chunk)
        for field in self._fields:
            values = [event.get(field.name) for event in events]
            columns.append(bytes(value is not None for value in values))
            if field.kind == "categorical":
                strings = [(value or "").encode() for value in values]
                columns += [np.array([len(text) for text in strings], "<u4").tobytes(), *strings]
            else:
                filled = [0 if value is None else value for value in values]
                columns.append(np.array(filled, DTYPES[field.kind]).tobytes())
        return b"".join(columns)


Feed = InputsFeed | EventsFeed


def _values(field: Field, length: int, random: np.random.Generator) -> list[Any]:
    """Values near the example, and categories that the model knows."""
    if field.kind == "categorical":
        labels = field.labels or (str(field.example or "a"),)
        return [labels[index] for index in random.integers(0, len(labels), length)]
    if field.kind == "boolean":
        return list((random.random(length) < 0.5).tolist())
    center = float(field.example or 0.0)
    spread = max(1.0, abs(center) / 2)
    # adding 0.0 turns -0.0 into its canonical form
    return list(((center + spread * random.normal(size=length)).round(2) + 0.0).tolist())


def longest_request(model: ModelDescription, event_bytes: int) -> int:
    """Events of an estimated size that fit into one request."""
    return min(model.max_predict_steps, int(model.max_body_bytes * BODY_SHARE) // event_bytes)


def longest_chunk(model: ModelDescription) -> int:
    """Events that the service accepts at once, by its limits and the estimated size of an event."""
    event_bytes = max(NUMBER_BYTES * len(model.codes), FIELD_BYTES * len(model.fields or ()))
    return max(1, min(model.max_chunk_steps, longest_request(model, event_bytes)))


def make_feeds(model: ModelDescription, longest_steps: int, seed: int) -> list[Feed]:
    """Feeds that the streams of a scenario use in turn, for chunks of so many events."""
    length = max(MIN_LENGTH, longest_steps)
    kinds = [InputsFeed] if model.fields is None else [EventsFeed, InputsFeed]
    return [kind(model, length, seed) for kind in kinds]


def next_tag(tag: bytes, start: int, feed: Feed, chunk: Chunk) -> bytes:
    """The tag of a stream, 16 bytes, after a chunk whose first event is at `start`; `tag` is that
    before it, zero at the beginning of an epoch."""
    letter = feed.member[0].upper().encode()
    digest = sha256(letter + struct.pack("<Q", chunk.steps) + feed.canonical(chunk)).digest()
    return sha256(tag + struct.pack("<Q", start) + digest).digest()[:16]
