"""Writes the entries of output topics and of dead-letter topics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from models.artifact.artifact import Artifact
from models.artifact.fingerprint import version_of
from service.codec.media import Media, dumps
from service.codec.reply_writer import ReplyOptions, ReplyWriter
from service.consumers.alarms import AlarmFields
from service.consumers.where import parse_condition
from service.core.errors import CarryError
from service.core.values import FloatRows, StreamHead, StreamKey
from service.store.codec import WRITER, read_since
from service.store.topics import Destination, Entry, NewEntry

OF_ONE_EVENT: Final = ReplyOptions(return_sequences=False)

MAX_FIELDS: Final = 100
PACKED_FIELDS: Final = b"carry-fields"
"""The field of a dead letter with all names and values of an entry of more than `MAX_FIELDS`, as an
array of MessagePack (strings with any bytes): a script cannot write thousands of fields."""


Condition = tuple[StreamKey, StreamHead | None]
"""A stream, and the head that it must have; None if it must not exist."""


class OutputWriter:
    """Writes the outputs of one model, an entry for each event.

    Args:
        warm_events: after how many events a version has forgotten where its state began.
        where: which of them are written (`parse_condition`); all without one.

    Raises:
        OperatorError: `where` is invalid.
    """

    def __init__(
        self, artifact: Artifact, media: Media, warm_events: int, where: str | None = None
    ):
        self._warm_events = warm_events
        self._writer = ReplyWriter(artifact)
        detection = artifact.spec.detection
        self._alarms = None if detection is None else AlarmFields(artifact, detection.head)
        self._where = None
        if where is not None:
            alarm = None if self._alarms is None else self._alarms.output
            self._where = parse_condition(where, artifact.outputs, alarm)
        self._media = media
        self._name = artifact.spec.name
        outputs = artifact.outputs
        only = outputs.outputs[0]
        is_list = len(outputs.outputs) == 1 and len(only.shape) == 1 and not outputs.attention
        # the JSON of an event's outputs in front of its numbers, if they are one list
        self._before = (
            b"{%b:[" % dumps(media, only.name) if is_list and media is Media.JSON else b""
        )

    def shared(
        self, stream: str, head: StreamHead, steps: int, state: bytes
    ) -> tuple[str | int, ...]:
        """The fields that the outputs of a chunk begin with.

        Args:
            head: of the stream after the chunk.
            steps: of the chunk.
            state: encoded, after the chunk.
        """
        fields = (
            "stream", stream, "epoch", head.epoch.hex(), "tag", head.tag.hex(), "model", self._name,
            "version", version_of(state[WRITER].hex()), "time", time.time_ns() // 1_000_000,
        )  # fmt: skip
        since = read_since(state)
        if since is None:
            return fields
        return (*fields, "warm", f"{head.position - steps - since}/{self._warm_events}")

    def entries(self, start: int, rows: FloatRows, state: bytes) -> list[NewEntry]:
        """The entries for the outputs of a chunk, without what they share.

        Args:
            start: position of the event of the first output.
            state: encoded, after the chunk.
        """
        of_alarms = {} if self._alarms is None else self._alarms.of_chunk(rows, state)
        positions: Sequence[int] = range(start, start + len(rows))
        if self._where is not None:
            chosen = self._where(rows).nonzero()[0]
            positions, rows = (start + chosen).tolist(), rows[chosen]
        return [
            NewEntry(
                Destination.OUTPUTS,
                ("position", position, *of_alarms.get(position - start, ()), "outputs", encoded),
            )
            for position, encoded in zip(positions, self._encode(rows), strict=True)
        ]

    def _encode(self, rows: FloatRows) -> list[bytes]:
        """The outputs of each event."""
        if self._before and len(rows):
            # `[[1.0,2.0],[3.0,4.0]]`, whose numbers have no brackets
            lists = dumps(self._media, np.ascontiguousarray(rows))[2:-2].split(b"],[")
            return [b"%b%b]}" % (self._before, numbers) for numbers in lists]
        return [
            dumps(self._media, self._writer.outputs(rows[at : at + 1], OF_ONE_EVENT))
            for at in range(len(rows))
        ]


def dead_letter(entry: Entry, code: str, reason: str, stream: str | None) -> NewEntry:
    """The dead letter of an entry: code and reason, and the original fields."""
    now_ms = time.time_ns() // 1_000_000
    fields: Sequence[bytes] = entry.fields or ()
    if len(fields) > 2 * MAX_FIELDS:
        fields = (PACKED_FIELDS, _pack(fields))
    added = (
        "carry-code", code, "carry-reason", reason, "carry-stream", stream or "",
        "carry-entry", entry.id, "carry-time", now_ms,
    )  # fmt: skip
    return NewEntry(Destination.DEAD_LETTERS, (*added, *fields))


def condition_of(key: StreamKey, error: CarryError) -> Condition | None:
    """The head of a stream on which the error of its chunk depends, if it depends on one."""
    facts = error.facts
    if "tag" not in facts:
        return None
    if facts["tag"] is None:
        return key, None
    epoch, tag = bytes.fromhex(facts["epoch"]), bytes.fromhex(facts["tag"])
    return key, StreamHead(epoch, tag, facts["position"])


def _pack(values: Sequence[bytes]) -> bytes:
    """An array of MessagePack. The servers' own decoder knows no bytes, and no short lengths."""
    packed = [b"\xdd", len(values).to_bytes(4, "big")]
    for value in values:
        packed += (b"\xdb", len(value).to_bytes(4, "big"), value)
    return b"".join(packed)
