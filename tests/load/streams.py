"""The streams of a load as their client knows them, and whether a reply fits what it knows.

A stream remembers every chunk that was acknowledged, so that the whole of its history can be
computed a second time. It is left for a new one after so many events, and after anything that
went wrong with it: what was acknowledged until then still has to be right.

Nothing here waits or talks; one greenlet at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.load.description import Description
from tests.load.tape import ZERO_TAG, Chunk, Tape, next_tag

BEGIN_SHARE = 0.5
"""How often a stream is begun, while there are fewer than there may be, instead of taking the
one that has waited longest: so that even in a short run states are fetched that lay for long."""


class Fault(NamedTuple):
    """A wrong answer: a stable code, and what was expected and what came."""

    code: str
    detail: str


class Applied(NamedTuple):
    """An acknowledged chunk.

    Attributes:
        start: the position of its first event.
        tag: of the stream after it; empty where the client cannot tell (appends).
        outputs: float64 [T, O]; None where they are not kept or did not come.
    """

    chunk: Chunk
    start: int
    tag: bytes
    outputs: NDArray[np.float64] | None


@dataclass(slots=True, eq=False)
class Stream:
    """One stream.

    Attributes:
        appends: chunks go without a position, many at once.
        sent: events handed out, acknowledged or not.
        position: where the stream stands by its last reply; unused with `appends`.
        epoch: of the first reply; empty before.
        kept: whether the outputs are kept, to be compared.
        creations: replies that said they began the stream.
        doubtful: appends of which nobody knows whether they were applied.
        left: whether it gets no more chunks.
    """

    name: str
    tape: Tape
    appends: bool
    sent: int = 0
    position: int = 0
    epoch: str = ""
    tag: bytes = ZERO_TAG
    kept: bool = False
    creations: int = 0
    doubtful: int = 0
    left: bool = False
    applied: list[Applied] = field(default_factory=list)

    def body(self, chunk: Chunk) -> bytes:
        """The body of a request with the next chunk."""
        position = b"" if self.appends else b'"position":%d,' % self.position
        return b'{%b"%b":[%b]}' % (position, self.tape.member, self.tape.json(chunk))

    def accept(
        self, model: Description, chunk: Chunk, reply: Mapping[str, Any], *, tried_before: bool
    ) -> Fault | None:
        """Take a reply in, or say what is wrong with it; then the stream is left.

        Args:
            reply: the body of a 200.
            tried_before: an attempt with this chunk has failed, so that this may be its replay.
        """
        try:
            fault = self._judged(model, chunk, reply, tried_before)
        except (KeyError, TypeError, ValueError) as error:
            fault = Fault("unreadable", f"{type(error).__name__}: {error}")
        if fault is not None:
            self.left = True
            return Fault(fault.code, f"stream {self.name!r}: {fault.detail}")
        return None

    def _judged(
        self, model: Description, chunk: Chunk, reply: Mapping[str, Any], tried_before: bool
    ) -> Fault | None:
        position, epoch = int(reply["position"]), str(reply["epoch"])
        start = position - chunk.steps if self.appends else self.position
        named = (reply["model"], reply["stream"])
        if named != (model.name, self.name):
            return Fault("wrong_stream", f"expected a reply of that stream, got one of {named}")
        if position != start + chunk.steps or start < 0:
            return Fault("wrong_position", f"expected {start + chunk.steps}, got {position}")
        if self.epoch and epoch != self.epoch:
            return Fault("wrong_epoch", f"expected epoch {self.epoch}, got {epoch}")
        if reply["replayed"] and not tried_before:
            return Fault("wrong_replay", f"the chunk at {start} was sent once and came replayed")
        begins = bool(reply.get("created"))
        if begins != (start == 0) and not (start == 0 and reply["replayed"]):
            return Fault("wrong_beginning", f"created is {begins} at position {start}")
        tag = b"" if self.appends else next_tag(self.tag, start, self.tape, chunk)
        if tag and reply["tag"] != tag.hex():
            return Fault("wrong_tag", f"expected {tag.hex()} at {position}, got {reply['tag']}")
        try:
            outputs = model.pack(reply["outputs"], chunk.steps)
        except ValueError as error:
            return Fault("wrong_outputs", f"at position {start}: {error}")
        self.epoch = epoch
        self._take(Applied(chunk, start, tag, outputs if self.kept else None))
        return None

    def skip(self, chunk: Chunk) -> None:
        """The chunk was applied, and its outputs are gone."""
        tag = next_tag(self.tag, self.position, self.tape, chunk)
        self._take(Applied(chunk, self.position, tag, None))

    def _take(self, applied: Applied) -> None:
        self.applied.append(applied)
        self.position = applied.start + applied.chunk.steps
        self.tag = applied.tag

    def rewind(self, problem: Mapping[str, Any]) -> Fault | None:
        """The stream stands before the chunk, as a 409 `position_ahead` says; go back there.

        Raises nothing: a state that no prefix of the stream's events gives is a fault, and
        leaves the stream.
        """
        position, tag = problem.get("position"), str(problem.get("tag") or "")
        while self.applied and self.position != position:
            self.applied.pop()
            before = self.applied[-1] if self.applied else None
            self.position = before.start + before.chunk.steps if before else 0
            self.tag = before.tag if before else ZERO_TAG
        if self.position == (position or 0) and (not self.applied or tag == self.tag.hex()):
            if not self.applied:
                self.epoch = ""
            self.sent = sum(each.chunk.steps for each in self.applied)
            return None
        self.left = True
        return Fault(
            "no_prefix",
            f"stream {self.name!r}: stands at {position} with tag {tag}, which no prefix of "
            "its events gives",
        )

    def history(self) -> list[Applied] | Fault:
        """The acknowledged chunks from the beginning, without a gap.

        With `appends` they are put in the order of their positions, and must lie end to end:
        an event that was acknowledged twice, or never, is a fault, but for the appends of which
        nobody knows; behind those the history ends.
        """
        found: list[Applied] = []
        position = 0
        for each in sorted(self.applied, key=lambda applied: applied.start):
            if each.start < position or (each.start > position and not self.doubtful):
                return Fault(
                    "lost_chunk" if each.start > position else "doubled_chunk",
                    f"stream {self.name!r}: chunks end at {position}, the next acknowledged one "
                    f"begins at {each.start}",
                )
            if each.start > position:
                break
            found.append(each)
            position = each.start + each.chunk.steps
        return found


class Population:
    """The streams of a scenario, which take turns."""

    def __init__(
        self,
        tapes: list[Tape],
        *,
        prefix: str,
        count: int,
        stream_events: int,
        appends: bool,
        keep: int,
        seed: int,
    ):
        """Up to `count` streams at a time, more only where all of them are out.

        Args:
            tapes: the streams are fed from these in turn.
            prefix: put before every name.
            keep: of how many streams, drawn evenly from all, the outputs are kept.
        """
        self._tapes = tapes
        self._prefix = prefix
        self._count = count
        self._stream_events = stream_events
        self._appends = appends
        self._keep = keep
        self._random = Random(seed)
        self._waiting: deque[Stream] = deque()
        self._alive = 0
        self.begun = 0
        self.kept: list[Stream] = []
        self.appended: list[Stream] = []

    def take(self) -> Stream:
        """The stream whose turn it is. With positions it is nobody else's until given back."""
        may_begin = self._alive < self._count
        if not self._waiting or (may_begin and self._random.random() < BEGIN_SHARE):
            stream = self._begin()
        else:
            stream = self._waiting.popleft()
        if self._appends:
            self._waiting.append(stream)
        return stream

    def give_back(self, stream: Stream) -> None:
        """Its chunk is settled; call once for each that was taken."""
        if stream.sent >= self._stream_events:
            stream.left = True
        if not stream.left:
            if not self._appends:
                self._waiting.append(stream)
        elif self._appends:
            if stream in self._waiting:
                self._waiting.remove(stream)
                self._alive -= 1
        else:
            self._alive -= 1

    def _begin(self) -> Stream:
        tape = self._tapes[self.begun % len(self._tapes)]
        stream = Stream(f"{self._prefix}{self.begun}", tape, self._appends)
        self.begun += 1
        self._alive += 1
        if self._appends:
            self.appended.append(stream)
        self._offer(stream)
        return stream

    def _offer(self, stream: Stream) -> None:
        """Reservoir sampling (Vitter 1985, algorithm R): each stream is kept with equal chance."""
        if len(self.kept) < self._keep:
            stream.kept = True
            self.kept.append(stream)
            return
        index = self._random.randrange(self.begun)
        if index < self._keep:
            dropped = self.kept[index]
            dropped.kept = False
            dropped.applied = [each._replace(outputs=None) for each in dropped.applied]
            stream.kept = True
            self.kept[index] = stream
