"""Records of what the clients observed, for the checker. Times are those of the monotonic clock."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from tests.faults.network import Outputs, Rows

FIRST_TAG: Final = bytes(16)


def digest(rows: Rows) -> bytes:
    """The digest of a chunk of inputs with a position, by docs/reference/protocol.md."""
    count = len(rows).to_bytes(8, "little")
    return hashlib.sha256(b"I" + count + rows.astype("<f4").tobytes()).digest()


def next_tag(tag: bytes, start: int, chunk: bytes) -> bytes:
    """The tag after a chunk, by docs/reference/protocol.md."""
    return hashlib.sha256(tag + start.to_bytes(8, "little") + chunk).digest()[:16]


@dataclass(slots=True, eq=False, repr=False)
class Sent:
    """A chunk of rows [T, F] that was sent, once or many times; `acked` after a reply."""

    start: int
    rows: Rows
    digest: bytes
    acked: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A stream's head. Position 0 and no tag: it does not exist."""

    epoch: str | None
    tag: bytes | None
    position: int


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Reply(Head):
    """A reply that names the stream's head: an acknowledgement, or a rejection with its code.

    Attributes:
        sent_s, at_s: when the attempt was sent that this answers, and when it was answered.
    """

    sent: Sent
    worker: str
    sent_s: float
    at_s: float
    outputs: Outputs | None = None
    replayed: bool = False
    code: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """From a moment to another; not `sure` where a request that got no reply may still act."""

    from_s: float
    until_s: float
    sure: bool = True


@dataclass(frozen=True, slots=True)
class Loss:
    """A fault that may roll back acknowledged chunks, and when.

    Attributes:
        since_s: what was acknowledged before this moment must have survived.
        struck_s: nothing is missing before this moment.
        until_s: what was sent after this moment must have survived.
        done_s: the store served again.
    """

    what: str
    since_s: float
    struck_s: float
    until_s: float
    done_s: float


@dataclass(slots=True)
class StreamLog:
    """Log of one stream.

    Attributes:
        noticed_s: when its client noticed that the history it knew was replaced: by a rejection, by
            If-Match, or by a tag that does not follow.
        removed: when the stream was deleted or expired on purpose.
        final: its head at the end; None where it did not exist.
    """

    name: str
    sents: list[Sent] = field(default_factory=list)
    acks: list[Reply] = field(default_factory=list)
    rejections: list[Reply] = field(default_factory=list)
    noticed_s: list[float] = field(default_factory=list)
    removed: list[Span] = field(default_factory=list)
    final: Head | None = None


@dataclass(slots=True)
class Burst:
    """Chunks without a position, sent at once to one new stream.

    Attributes:
        unknown: how many got no reply, and may or may not have been applied.
    """

    name: str
    span: Span
    unknown: int
    acks: list[Reply]
    final: Head | None


@dataclass(slots=True)
class History:
    """Records of one run.

    Attributes:
        unexpected: problems, logged exceptions and clients that did not end.
        seen: what occurred in the run and was checked, by name.
        began_s: moments are reported in seconds after this one.
    """

    streams: list[StreamLog] = field(default_factory=list)
    bursts: list[Burst] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    began_s: float = 0.0
