"""Records of what the clients observed, for the checker. Times are those of the monotonic clock."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tests.faults.network import Outputs, Rows

FIRST_TAG: Final = bytes(16)


def next_tag(tag: bytes, start: int, digest: bytes) -> bytes:
    """The tag after a chunk, by docs/reference/protocol.md."""
    return hashlib.sha256(tag + start.to_bytes(8, "little") + digest).digest()[:16]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Chunk:
    """Rows [T, F] of a stream, sent once or many times; without a start they are appended."""

    stream: str
    start: int | None
    rows: Rows

    @property
    def digest(self) -> bytes:
        """The digest of inputs with a position, by docs/reference/protocol.md."""
        count = len(self.rows).to_bytes(8, "little")
        return hashlib.sha256(b"I" + count + self.rows.astype("<f4").tobytes()).digest()


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A stream's head; without a tag it does not exist."""

    epoch: str | None
    tag: bytes | None
    position: int

    @property
    def etag(self) -> str | None:
        """Its ETag, for If-Match."""
        return None if self.tag is None else f"{self.epoch}-{self.tag.hex()}"

    def leads_to(self, ack: Reply) -> bool:
        """Whether the tag of an acknowledgement follows, as far as is known."""
        if self.tag is None and self.position > 0:
            return True
        return ack.tag == next_tag(self.tag or FIRST_TAG, self.position, ack.chunk.digest)


NO_HEAD: Final = Head(None, None, 0)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Reply(Head):
    """A reply that names the stream's head: an acknowledgement, or a rejection with its code."""

    chunk: Chunk
    worker: str
    sent_s: float  # when the attempt was sent that this answers
    at_s: float  # when it was answered
    outputs: Outputs | None = None
    replayed: bool = False
    code: str = ""
    version: str | None = None  # of the model, which answered; None if the reply does not name it
    # how many events before the chunk its state had seen, and after how many all are forgotten;
    # None if it had seen all, or enough
    warm: tuple[int, int] | None = None


class Span(NamedTuple):
    """From a moment to another; not `sure` where a request that got no reply may still act."""

    from_s: float
    until_s: float
    sure: bool = True


@dataclass(frozen=True, slots=True)
class Loss:
    """A fault that may roll back acknowledged chunks, and when."""

    what: str
    since_s: float  # what was acknowledged before this moment must have survived
    struck_s: float  # nothing is missing before this moment
    # what was sent after this moment must have survived
    until_s: float = field(default_factory=time.monotonic)
    done_s: float = field(default_factory=time.monotonic)  # the store served again

    def describe(self, began_s: float) -> str:
        """Its moments, in seconds after another one."""
        moments_s = {"since": self.since_s, "struck": self.struck_s}
        moments_s |= {"until": self.until_s, "done": self.done_s}
        times = (f"{name} {at_s - began_s:.2f} s" for name, at_s in moments_s.items())
        return f"{self.what}: {', '.join(times)}"


@dataclass(slots=True)
class StreamLog:
    """Log of one stream."""

    name: str
    sent: list[Chunk] = field(default_factory=list)
    acks: list[Reply] = field(default_factory=list)
    rejections: list[Reply] = field(default_factory=list)
    # when its client noticed that the history it knew was replaced: by a rejection, by If-Match, or
    # by a tag that does not follow
    noticed_s: list[float] = field(default_factory=list)
    removed: list[Span] = field(default_factory=list)  # deleted or expired on purpose
    final: Head = NO_HEAD  # at the end


class Burst(NamedTuple):
    """Chunks without a position, sent at once to one new stream; `unknown` of them got no reply."""

    stream: str
    span: Span
    unknown: int
    acks: list[Reply]
    final: Head


@dataclass(slots=True)
class History:
    """Records of one run."""

    streams: list[StreamLog] = field(default_factory=list)
    bursts: list[Burst] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    # problems, logged exceptions and clients that did not end
    unexpected: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)  # what occurred and was checked, by name
    began_s: float = field(default_factory=time.monotonic)  # moments are reported relative to it
