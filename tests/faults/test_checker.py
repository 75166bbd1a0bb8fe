"""The checker itself: what it accepts, and that it rejects every mistake."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import numpy as np
import pytest

from tests.faults.checker import CHECKED, DOUBLED, LOST, MIXED, ROLLED_BACK, check, check_burst
from tests.faults.history import (
    FIRST_TAG,
    Burst,
    Chunk,
    Head,
    History,
    Loss,
    Reply,
    Span,
    StreamLog,
    next_tag,
)
from tests.faults.network import UNITS, ZERO, Rows, compute, random_events

pytestmark = pytest.mark.harness

OTHERS = random_events(np.random.default_rng(9), 5)
EPOCH, OTHER = "aa" * 8, "bb" * 8
WRONG_TAG, OTHER_OUTPUTS = bytes(range(16)), np.ones((5, UNITS), np.float32)


class Stream:
    """A stream as a faultless service would serve it; one chunk a second."""

    def __init__(self, chunks: int = 12):
        self.log = StreamLog("s")
        self.now_s = 0.0
        self._random = np.random.default_rng(3)
        self._heads = self._all_heads = [(FIRST_TAG, 0, ZERO)]
        for _ in range(chunks):
            self.chunk()

    def chunk(self, epoch: str = EPOCH) -> Self:
        """One more chunk, applied and acknowledged."""
        tag, position, state = self._heads[-1]
        chunk = Chunk("s", position, random_events(self._random, 5))
        outputs = compute(state, chunk.rows)
        head = (next_tag(tag, position, chunk.digest), position + 5, outputs[-1])
        if self._heads is not self._all_heads:
            self._all_heads.append(head)
        self._heads.append(head)
        ack = Reply(epoch, *head[:2], chunk, "a", *self._next_second(), outputs.astype(np.float32))
        self.log.sent.append(chunk)
        self.log.acks.append(ack)
        self.log.final = Head(epoch, *head[:2])
        return self

    def at(self, count: int) -> Self:
        """The store has the state after the first chunks that were ever applied."""
        self._heads = self._all_heads[: count + 1]
        return self

    def reject(self) -> Self:
        """A rejection that names the present head."""
        head, times_s, last = self._heads[-1][:2], self._next_second(), self.log.sent[-1]
        self.log.rejections.append(Reply(EPOCH, *head, last, "b", *times_s, code="position_ahead"))
        self.log.noticed_s.append(self.now_s)
        return self

    def remove(self) -> Self:
        """The stream is deleted, and its client notices."""
        self.log.removed.append(Span(*self._next_second()))
        self.log.noticed_s.append(self.now_s + 1)
        return self.at(0)

    def answer(self, place: int, **change: Any) -> Self:
        """Another acknowledgement of a chunk."""
        self.log.acks[place] = replace(self.log.acks[place], **change)
        return self

    def forget(self, place: int) -> Self:
        """A chunk is applied, but was not acknowledged."""
        del self.log.acks[place]
        return self

    def end(self, tag: bytes) -> Self:
        """The stream has another tag at the end."""
        self.log.final = replace(self.log.final, tag=tag)
        return self

    def _next_second(self) -> tuple[float, float]:
        self.now_s += 1
        return self.now_s, self.now_s + 0.5


ROLLBACK = Loss("rolled back", since_s=10.8, struck_s=12.5, until_s=12.6, done_s=12.7)
"""May take the last two of twelve chunks."""


RESTARTED = replace(ROLLBACK, until_s=20.0)
HISTORIES: dict[str, tuple[Stream, Loss | None, set[str]]] = {
    "correct": (Stream(), None, set()),
    "rolled back": (Stream().at(10).reject().chunk(), ROLLBACK, set()),
    "rolled back, not noticed": (Stream().at(10).chunk(), ROLLBACK, {LOST}),
    "rolled back too far": (Stream().at(9).reject().chunk(), ROLLBACK, {LOST}),
    "missing": (Stream().at(10).reject().chunk(), None, {LOST}),
    # others advanced the stream after a rollback; a worker continues from its cache
    "continued": (Stream().at(10).reject().chunk().chunk().at(12).chunk(), ROLLBACK, {LOST}),
    "denied": (Stream().at(9).reject().at(12).chunk(), None, {LOST}),
    "denied after a rollback": (Stream().at(10).reject().chunk(), RESTARTED, set()),
    "denied before it": (Stream().at(10).reject().chunk(), replace(RESTARTED, struck_s=14), {LOST}),
    "removed": (Stream().remove().chunk(OTHER), None, set()),
    "removed, comes back": (Stream().remove().chunk(OTHER).at(12).chunk(), None, {LOST, MIXED}),
    # removal explains the end of an epoch, but no missing chunk before it
    "removed after a loss": (Stream().at(11).chunk().remove().chunk(OTHER), None, {LOST}),
    "another tag": (Stream().answer(5, tag=WRONG_TAG), None, {LOST, MIXED}),
    "another position": (Stream().answer(5, position=7), None, {MIXED}),
    "another output": (Stream().answer(5, outputs=OTHER_OUTPUTS), None, {MIXED}),
    "another final tag": (Stream().end(WRONG_TAG), None, {LOST, MIXED}),
    "without an answer": (Stream().forget(4), None, set()),
}


@pytest.mark.parametrize(("stream", "loss", "expected"), HISTORIES.values(), ids=HISTORIES)
def test_mistake_in_a_history_is_detected(
    stream: Stream, loss: Loss | None, expected: set[str]
) -> None:
    history = History([stream.log], losses=[] if loss is None else [loss])
    assert {kind for kind, _ in check(history)} == expected
    assert history.seen[CHECKED] == len(stream.log.acks)
    assert expected or history.seen[ROLLED_BACK] == (2 if loss else 0)


@pytest.mark.parametrize(
    ("state_after", "kind"),
    [
        (lambda chunks: [*chunks[:3], chunks[3], chunks[3], *chunks[4:]], DOUBLED),
        (lambda chunks: [*chunks[:3], *chunks[4:]], LOST),
        (lambda chunks: [*chunks[:3], chunks[4], chunks[3], *chunks[5:]], MIXED),
        (lambda chunks: [*chunks[:3], OTHERS, *chunks[4:]], MIXED),
        (lambda chunks: [OTHERS, *chunks], MIXED),
    ],
    ids=["doubled", "lost", "swapped", "wrong", "another's state"],
)
def test_outputs_of_another_state_are_detected_many_chunks_later(
    state_after: Callable[[list[Rows]], list[Rows]], kind: str
) -> None:
    stream = Stream(40)
    rows = np.concatenate(state_after([chunk.rows for chunk in stream.log.sent]))
    stream.answer(-1, outputs=compute(ZERO, rows)[-5:].astype(np.float32))
    assert {kind for kind, _ in check(History([stream.log]))} == {kind}


@pytest.mark.parametrize(
    ("starts", "unknown", "head", "wrong", "expected"),
    [
        ([0, 3, 6], 0, 9, 0, set()),
        ([0, 3, 9], 1, 12, 0, set()),
        ([0, 3, 3], 0, 9, 0, {LOST}),
        ([0, 3, 6], 0, 6, 0, {LOST}),
        ([0, 3, 6], 0, 12, 0, {DOUBLED}),
        ([0, 3, 6], 0, 9, 1, {MIXED}),
    ],
    ids=["all", "one without answer", "one place twice", "too short", "too long", "other state"],
)
def test_appends_have_distinct_places(
    starts: list[int], unknown: int, head: int, wrong: int, expected: set[str]
) -> None:
    rows = random_events(np.random.default_rng(4), 9)
    outputs = compute(ZERO, rows).astype(np.float32)
    outputs[3:6] += wrong
    acks = []
    for number, start in enumerate(starts):
        own = slice(3 * number, 3 * number + 3)
        chunk, tag = Chunk("e", None, rows[own]), bytes([number] * 16)
        acks.append(Reply(EPOCH, tag, start + 3, chunk, "a", 1.0, 2.0, outputs[own]))
    burst = Burst("e", Span(1.0, 2.0), unknown, acks, Head(EPOCH, bytes(16), head))
    assert {kind for kind, _ in check_burst(burst)} == expected
