"""What the clients saw, as the checker reads it. Times are those of the monotonic clock."""

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
    """A chunk that was sent, once or many times.

    Attributes:
        start: its position.
        rows: its events, [T, F].
        acked: some reply to it came.
    """

    start: int
    rows: Rows
    digest: bytes
    sent_s: float
    acked: bool = False


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Ack:
    """A reply to a chunk: its events are applied, says the service.

    Attributes:
        sent_s: when the try was sent that this answers.
        expected_tag: what the tag had to be by what the client knew; None where it knew nothing.
    """

    sent: Sent
    worker: str
    epoch: str
    tag: bytes
    position: int
    outputs: Outputs
    replayed: bool
    sent_s: float
    at_s: float
    expected_tag: bytes | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """A refusal that says where the stream stands; position 0 and no tag: it does not exist."""

    code: str
    worker: str
    epoch: str | None
    tag: bytes | None
    position: int
    sent_s: float
    at_s: float


@dataclass(frozen=True, slots=True)
class Span:
    """From a moment to another; not `sure` where a request that got no reply may still act."""

    from_s: float
    until_s: float
    sure: bool = True


@dataclass(frozen=True, slots=True)
class Loss:
    """Something that may take acknowledged chunks away, as the operator knows.

    Attributes:
        what: the fault.
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


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a stream stands: as a read found it."""

    epoch: str
    tag: bytes
    position: int


@dataclass(slots=True)
class StreamLog:
    """All that was seen of one stream.

    Attributes:
        noticed_s: when its client noticed that the history it knew is gone: by a refusal, by
            If-Match, or by a tag that does not follow.
        forgotten: when the stream was deleted or expired on purpose.
        final: where it stood at the end; None where it did not exist.
    """

    name: str
    sents: list[Sent] = field(default_factory=list)
    acks: list[Ack] = field(default_factory=list)
    tolds: list[Told] = field(default_factory=list)
    noticed_s: list[float] = field(default_factory=list)
    forgotten: list[Span] = field(default_factory=list)
    final: Standing | None = None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class AppendAck:
    """A reply to a chunk without a position."""

    rows: Rows
    worker: str
    epoch: str
    tag: bytes
    position: int
    outputs: Outputs


@dataclass(slots=True)
class Episode:
    """Chunks without a position, sent at once to one new stream.

    Attributes:
        sent: how many.
        unknown: how many got no reply, and may or may not have been applied.
    """

    name: str
    span: Span
    sent: int
    unknown: int
    acks: list[AppendAck]
    final: Standing | None


@dataclass(slots=True)
class History:
    """What one run left behind for the checker.

    Attributes:
        began_s: moments are told as seconds after this one.
    """

    streams: list[StreamLog] = field(default_factory=list)
    episodes: list[Episode] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    began_s: float = 0.0
