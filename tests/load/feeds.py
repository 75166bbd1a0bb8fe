"""Random events for load, generated in advance, and the tags of the streams that consume them.

Every chunk is cut from a feed of thousands of events. A feed also gives the canonical bytes of a
chunk by the protocol's reference, so that a client computes each tag of a stream for itself.
"""

from __future__ import annotations

import struct
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from carry_client import Field, ModelDescription
from tests.load.target import LoadError

FIRST_MS = 1_356_998_400_000
GAP_MS = 61_000
ABSENT_SHARE = 0.2
MIN_LENGTH = 4096
NUMBER_BYTES, FIELD_BYTES = 12, 80
"""Upper estimates of a number, and of a field with its name, in a body."""
BODY_SHARE = 0.8
"""How full a body may be by its estimate."""
FIRST_TAG = bytes(16)


class Chunk(NamedTuple):
    """Consecutive events of one stream.

    Attributes:
        offset: of the first event in the feed.
        steps: T, the number of events.
        sent: events of the stream before it, from which its timestamps follow.
    """

    offset: int
    steps: int
    sent: int

    def times_ms(self) -> NDArray[np.int64]:
        """Timestamps of the events, epoch milliseconds, [T]."""
        return FIRST_MS + (self.sent + np.arange(self.steps, dtype=np.int64)) * GAP_MS

    @property
    def part(self) -> slice:
        """Its events in the feed."""
        return slice(self.offset, self.offset + self.steps)


class InputsFeed:
    """Rows of encoded values: codes drawn evenly, other columns from a normal distribution.

    Attributes:
        member: of a body, that has the events.
        event_bytes: estimated size of one event in a body.
    """

    member = "inputs"

    def __init__(self, model: ModelDescription, length: int, seed: int):
        random = np.random.default_rng(seed)
        rows = random.normal(size=(length, len(model.codes))).round(4)
        for column, codes in enumerate(model.codes):
            if codes:
                rows[:, column] = random.integers(0, codes, length)
        self._rows = rows.astype("<f4")
        self._events = rows.tolist()
        self.length = length
        self.event_bytes = len(orjson.dumps(self._events)) // length + 1

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
        self._fields = model.fields or ()
        self._times = [field.name for field in self._fields if field.kind == "timestamp"]
        self._columns = {}
        self._events: list[dict[str, Any]] = [{} for _ in range(length)]
        for field in self._fields:
            present = np.ones(length, bool)
            if field.kind != "timestamp":
                if field.is_optional:
                    present = random.random(length) >= ABSENT_SHARE
                values = _values(field, length, random)
                for event, value, is_present in zip(self._events, values, present, strict=True):
                    if is_present:
                        event[field.name] = value
                self._columns[field.name] = (present, values)
        self.length = length
        self.event_bytes = len(orjson.dumps(self._events)) // length + 40 * len(self._times)

    def events(self, chunk: Chunk) -> list[Any]:
        events = self._events[chunk.part]
        if not self._times:
            return events
        times_ms = chunk.times_ms().tolist()
        return [
            {**event, **dict.fromkeys(self._times, time_ms)}
            for event, time_ms in zip(events, times_ms, strict=True)
        ]

    def canonical(self, chunk: Chunk) -> bytes:
        return b"".join(self._column(field, chunk) for field in self._fields)

    def _column(self, field: Field, chunk: Chunk) -> bytes:
        if field.kind == "timestamp":
            return b"\x01" * chunk.steps + chunk.times_ms().astype("<i8").tobytes()
        present, values = (column[chunk.part] for column in self._columns[field.name])
        if field.kind == "categorical":
            pairs = zip(values, present, strict=True)
            texts = [value.encode() if is_present else b"" for value, is_present in pairs]
            lengths = np.array([len(text) for text in texts], "<u4")
            return present.tobytes() + lengths.tobytes() + b"".join(texts)
        numbers = np.where(present, values, 0)
        dtype = "<f8" if field.kind == "numeric" else "u1"
        return bytes(present.tobytes() + numbers.astype(dtype).tobytes())


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


def longest_chunk(model: ModelDescription) -> int:
    """Events that the service accepts at once, by its limits and the estimated size of an event."""
    event_bytes = max(NUMBER_BYTES * len(model.codes), FIELD_BYTES * len(model.fields or ()))
    by_size = int(model.max_body_bytes * BODY_SHARE) // event_bytes
    return max(1, min(model.max_chunk_steps, model.max_predict_steps, by_size))


def make_feeds(model: ModelDescription, longest_steps: int, feed: str, seed: int) -> list[Feed]:
    """Feeds that the streams of a scenario use in turn.

    Args:
        longest_steps: of any chunk.
        feed: `inputs`, `events`, or `both`, which is `inputs` for a model without events.

    Raises:
        LoadError: events for a model without events.
    """
    if feed == "events" and model.fields is None:
        raise LoadError(f"--feed events: model {model.name!r} takes no events")
    length = max(MIN_LENGTH, longest_steps)
    feeds: list[Feed] = []
    if feed in ("both", "events") and model.fields is not None:
        feeds.append(EventsFeed(model, length, seed))
    if feed in ("both", "inputs"):
        feeds.append(InputsFeed(model, length, seed))
    return feeds


def next_tag(tag: bytes, start: int, feed: Feed, chunk: Chunk) -> bytes:
    """The tag of a stream after a chunk with a position, 16 bytes.

    Args:
        tag: before it; zero at the beginning of an epoch.
        start: the position of its first event.
    """
    letter = feed.member[0].upper().encode()
    digest = sha256(letter + struct.pack("<Q", chunk.steps) + feed.canonical(chunk)).digest()
    return sha256(tag + struct.pack("<Q", start) + digest).digest()[:16]
