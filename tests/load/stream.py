"""One stream of a load: checks each reply against what its client knows, and keeps the history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from service.client import ModelDescription
from tests.load.feeds import FIRST_TAG, Chunk, Feed, next_tag


class Fault(NamedTuple):
    """A wrong answer: a stable code, and what was expected and received."""

    code: str
    detail: str


class Applied(NamedTuple):
    """An acknowledged chunk.

    Attributes:
        start: the position of its first event.
        tag: of the stream after it; empty for appends.
        outputs: float32 [T, O]; None where the reply was not received.
    """

    chunk: Chunk
    start: int
    tag: bytes
    outputs: NDArray[np.float32] | None

    @property
    def end(self) -> int:
        """The position after it."""
        return self.start + self.chunk.steps


@dataclass(slots=True, eq=False)
class LoadStream:
    """A stream and all its acknowledged chunks.

    Attributes:
        appends: chunks have no position, and many are in flight.
        sent: events in chunks, acknowledged or not.
        position: by the last reply; unused for appends.
        unknown_appends: appends that may or may not have been applied.
        is_closed: no more chunks are sent, because of its age or a failure.
    """

    name: str
    feed: Feed
    appends: bool
    sent: int = 0
    position: int = 0
    epoch: str = ""
    tag: bytes = FIRST_TAG
    unknown_appends: int = 0
    is_closed: bool = False
    applied: list[Applied] = field(default_factory=list)

    def body(self, chunk: Chunk) -> bytes:
        """The body of the request with the next chunk."""
        position = {} if self.appends else {"position": self.position}
        return orjson.dumps({**position, self.feed.member: self.feed.events(chunk)})

    def accept(
        self, model: ModelDescription, chunk: Chunk, reply: Mapping[str, Any], *, is_retry: bool
    ) -> Fault | None:
        """Record a reply, or return what is wrong with it and close the stream.

        Args:
            is_retry: an earlier attempt failed, so that this may be the stored reply.
        """
        try:
            fault = self._check(model, chunk, reply, is_retry)
        except (KeyError, TypeError, ValueError) as error:
            fault = Fault("unreadable", f"{type(error).__name__}: {error}")
        if fault is None:
            return None
        self.is_closed = True
        return Fault(fault.code, f"stream {self.name!r}: {fault.detail}")

    def _check(
        self, model: ModelDescription, chunk: Chunk, reply: Mapping[str, Any], is_retry: bool
    ) -> Fault | None:
        position, epoch = int(reply["position"]), str(reply["epoch"])
        start = position - chunk.steps if self.appends else self.position
        names = (reply["model"], reply["stream"])
        if names != (model.name, self.name):
            return Fault("wrong_stream", f"expected a reply of that stream, got one of {names}")
        if position != start + chunk.steps or start < 0:
            return Fault("wrong_position", f"expected {start + chunk.steps}, got {position}")
        if self.epoch and epoch != self.epoch:
            return Fault("wrong_epoch", f"expected epoch {self.epoch}, got {epoch}")
        if reply["replayed"] and not is_retry:
            return Fault("wrong_replay", f"the chunk at {start} was sent once and is `replayed`")
        created = bool(reply.get("created"))
        if created != (start == 0) and not (start == 0 and reply["replayed"]):
            return Fault("wrong_beginning", f"created is {created} at position {start}")
        tag = b"" if self.appends else next_tag(self.tag, start, self.feed, chunk)
        if tag and reply["tag"] != tag.hex():
            return Fault("wrong_tag", f"expected {tag.hex()} at {position}, got {reply['tag']}")
        try:
            outputs = model.pack(reply["outputs"], chunk.steps)
        except ValueError as error:
            return Fault("wrong_outputs", f"at position {start}: {error}")
        if not np.isfinite(outputs).all():
            return Fault("wrong_outputs", f"at position {start}: expected finite numbers")
        self.epoch = epoch
        self._append(Applied(chunk, start, tag, outputs))
        return None

    def skip(self, chunk: Chunk) -> None:
        """The chunk was applied, and its reply is no longer stored."""
        tag = next_tag(self.tag, self.position, self.feed, chunk)
        self._append(Applied(chunk, self.position, tag, None))

    def _append(self, applied: Applied) -> None:
        self.applied.append(applied)
        self.position = applied.end
        self.tag = applied.tag

    def rewind(self, position: int, tag: str) -> Fault | None:
        """Return to the state that a 409 `position_ahead` names.

        A state that no prefix of the stream's chunks gives is a fault, and closes the stream.
        """
        while self.applied and self.position != position:
            self.applied.pop()
            last = self.applied[-1] if self.applied else None
            self.position, self.tag = (last.end, last.tag) if last else (0, FIRST_TAG)
        if self.position == position and (not self.applied or tag == self.tag.hex()):
            if not self.applied:
                self.epoch = ""
            self.sent = sum(each.chunk.steps for each in self.applied)
            return None
        self.is_closed = True
        return Fault(
            "no_prefix",
            f"stream {self.name!r}: is at {position} with tag {tag}, which no prefix of its "
            "events gives",
        )

    def history(self) -> list[Applied] | Fault:
        """The acknowledged chunks from position 0, without a gap.

        Those of appends must be contiguous in the order of their positions; after an append of
        unknown outcome the history ends at the first gap.
        """
        history: list[Applied] = []
        position = 0
        for each in sorted(self.applied, key=lambda applied: applied.start):
            if each.start > position and self.unknown_appends:
                break
            if each.start != position:
                return Fault(
                    "lost_chunk" if each.start > position else "doubled_chunk",
                    f"stream {self.name!r}: chunks end at {position}, the next acknowledged one "
                    f"begins at {each.start}",
                )
            history.append(each)
            position = each.end
        return history
