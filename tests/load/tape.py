"""Events made beforehand, out of which every chunk of a load is cut.

A tape is a long run of random events, each written as JSON once, so that the body of a chunk is
a join of ready pieces. The same events in the canonical form of docs/reference/protocol.md give the
digest of a chunk, by which a client can tell the tag that its stream must have next.

Timestamps cannot be made beforehand, since a stream's events move on in time while its chunks
come from anywhere on the tape: they are written into the pieces, one minute and a second
apart, from how many events of the stream were sent before.
"""

from __future__ import annotations

import struct
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from tests.load.description import Description, Field
from tests.load.scenarios import LoadError

FIRST_MS = 1_356_998_400_000
GAP_MS = 61_000
ABSENT_SHARE = 0.2
MIN_LENGTH = 4096
NUMBER_BYTES, FIELD_BYTES = 12, 80
"""What a number, and a field with its name, take in a body, generously."""
BODY_SHARE = 0.8
"""How full a body may be by its estimate."""
ZERO_TAG = bytes(16)


class Chunk(NamedTuple):
    """Consecutive events of one stream.

    Attributes:
        kind: which of the scenario's kinds of chunks.
        offset: of the first event on the tape.
        steps: T, how many events.
        sent: events of the stream that were sent before, by which its time is told.
    """

    kind: int
    offset: int
    steps: int
    sent: int


class Tape(Protocol):
    """What chunks are cut from.

    Attributes:
        member: the member of a body that holds the events, `inputs` or `events`.
        letter: the kind of feed in a digest.
        event_bytes: the size of one event in a body, about.
        length: how many events there are.
    """

    member: bytes
    letter: bytes
    event_bytes: int
    length: int

    def json(self, chunk: Chunk) -> bytes:
        """The events as they stand in a body, without the brackets around them."""

    def canonical(self, chunk: Chunk) -> bytes:
        """The events in canonical bytes."""


class InputsTape:
    """Rows of encoded values: codes drawn evenly, other columns from a normal distribution."""

    member, letter = b"inputs", b"I"

    def __init__(self, model: Description, length: int, seed: int):
        random = np.random.default_rng(seed)
        rows = random.normal(size=(length, len(model.codes))).round(4)
        for column, codes in enumerate(model.codes):
            if codes:
                rows[:, column] = random.integers(0, codes, length)
        self._rows = rows.astype("<f4")
        self._pieces = [orjson.dumps(row) for row in rows.tolist()]
        self.length = length
        self.event_bytes = sum(map(len, self._pieces)) // length + 1

    def json(self, chunk: Chunk) -> bytes:
        return b",".join(self._pieces[chunk.offset : chunk.offset + chunk.steps])

    def canonical(self, chunk: Chunk) -> bytes:
        return self._rows[chunk.offset : chunk.offset + chunk.steps].tobytes()


class EventsTape:
    """Events under the model's schema; optional fields are left out now and then."""

    member, letter = b"events", b"E"

    def __init__(self, model: Description, length: int, seed: int):
        assert model.fields is not None
        random = np.random.default_rng(seed)
        self._columns = [_Column(field, length, random) for field in model.fields]
        self._timed = any(field.kind == "timestamp" for field in model.fields)
        self._pieces = [
            b"{" + b",".join(filter(None, (c.members[i] for c in self._columns))) + b"}"
            for i in range(length)
        ]
        self.length = length
        self.event_bytes = sum(map(len, self._pieces)) // length + 14

    def json(self, chunk: Chunk) -> bytes:
        pieces = b",".join(self._pieces[chunk.offset : chunk.offset + chunk.steps])
        return pieces % (tuple(times_ms(chunk).tolist()) if self._timed else ())

    def canonical(self, chunk: Chunk) -> bytes:
        return b"".join(column.canonical(chunk) for column in self._columns)


def longest_chunk(model: Description) -> int:
    """Events that the service takes at once, by its limits and the size of an event, about."""
    event_bytes = max(NUMBER_BYTES * len(model.codes), FIELD_BYTES * len(model.fields or ()))
    by_size = int(model.max_body_bytes * BODY_SHARE) // event_bytes
    return max(1, min(model.max_chunk_steps, model.max_predict_steps, by_size))


def tapes_of(model: Description, longest_steps: int, feed: str, seed: int) -> list[Tape]:
    """What the streams of a scenario are fed from, in turn.

    Args:
        longest_steps: of any chunk.
        feed: `inputs`, `events`, or `both`, which is `inputs` for a model without events.

    Raises:
        LoadError: events for a model that takes none.
    """
    if feed == "events" and model.fields is None:
        raise LoadError(f"--feed events: model {model.name!r} takes no events")
    length = max(MIN_LENGTH, longest_steps)
    tapes: list[Tape] = []
    if feed in ("both", "events") and model.fields is not None:
        tapes.append(EventsTape(model, length, seed))
    if feed in ("both", "inputs"):
        tapes.append(InputsTape(model, length, seed))
    return tapes


def times_ms(chunk: Chunk) -> NDArray[np.int64]:
    """The timestamps of a chunk's events, epoch milliseconds, [T]."""
    first_ms = FIRST_MS + chunk.sent * GAP_MS
    return first_ms + np.arange(chunk.steps, dtype=np.int64) * GAP_MS


class _Column:
    """One field of every event on the tape: its JSON members and its canonical bytes.

    In the members `%` is doubled, since timestamps are written into them.
    """

    def __init__(self, field: Field, length: int, random: np.random.Generator):
        self._kind = field.kind
        self._present = np.ones(length, bool)
        if field.optional and field.kind != "timestamp":
            self._present = random.random(length) >= ABSENT_SHARE
        name = orjson.dumps(field.name) + b":"
        if field.kind == "timestamp":
            self.members = [name + b"%d"] * length
            return
        values = _values(field, length, random)
        there = self._present.tolist()
        self.members = [
            (name + orjson.dumps(value)).replace(b"%", b"%%") if present else b""
            for value, present in zip(values, there, strict=True)
        ]
        if field.kind == "categorical":
            self._texts = [
                value.encode() if present else b""
                for value, present in zip(values, there, strict=True)
            ]
            self._lengths = np.array([len(text) for text in self._texts], "<u4")
        else:
            dtype = "<f8" if field.kind == "numeric" else "u1"
            self._values = np.where(self._present, values, 0).astype(dtype)

    def canonical(self, chunk: Chunk) -> bytes:
        part = slice(chunk.offset, chunk.offset + chunk.steps)
        there = self._present[part].tobytes()
        if self._kind == "timestamp":
            return there + times_ms(chunk).astype("<i8").tobytes()
        if self._kind == "categorical":
            return there + self._lengths[part].tobytes() + b"".join(self._texts[part])
        return there + self._values[part].tobytes()


def _values(field: Field, length: int, random: np.random.Generator) -> list[Any]:
    """Values near the typical one, categories that the model knows."""
    if field.kind == "categorical":
        labels = field.labels or (str(field.typical or "a"),)
        return [labels[index] for index in random.integers(0, len(labels), length)]
    if field.kind == "boolean":
        return list((random.random(length) < 0.5).tolist())
    typical = float(field.typical or 0.0)
    spread = max(1.0, abs(typical) / 2)
    # adding 0.0 makes -0.0 what it is in canonical form
    return list(((typical + spread * random.normal(size=length)).round(2) + 0.0).tolist())


def next_tag(tag: bytes, start: int, tape: Tape, chunk: Chunk) -> bytes:
    """The tag of a stream after a chunk with a position, 16 bytes; see docs/reference/protocol.md.

    Args:
        tag: before it, 16 bytes; zero at the beginning of an epoch.
        start: the position of its first event.
    """
    digest = sha256(tape.letter + struct.pack("<Q", chunk.steps) + tape.canonical(chunk)).digest()
    return sha256(tag + struct.pack("<Q", start) + digest).digest()[:16]
