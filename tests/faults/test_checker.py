"""The checker itself: what it accepts, and that it rejects every mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.faults.checker import CHECKED, DOUBLED, LOST, MIXED, ROLLED_BACK, check, check_burst
from tests.faults.history import (
    FIRST_TAG,
    Burst,
    Head,
    History,
    Loss,
    Reply,
    Sent,
    Span,
    StreamLog,
    digest,
    next_tag,
)
from tests.faults.network import ZERO, Rows, compute, random_events

OTHERS = random_events(np.random.default_rng(9), 5)
EPOCH, OTHER = "aa" * 8, "bb" * 8


class Stream:
    """A stream as a faultless service would serve it; one chunk a second."""

    def __init__(self, chunks: int = 12):
        self.random = np.random.default_rng(3)
        self.log = StreamLog("s")
        self.now_s = 0.0
        self.heads = [(FIRST_TAG, 0, ZERO)]
        for _ in range(chunks):
            self.chunk()

    def chunk(self, epoch: str = EPOCH) -> None:
        """One more chunk, applied and acknowledged."""
        tag, position, state = self.heads[-1]
        rows = random_events(self.random, 5)
        self.now_s += 1
        sent = Sent(position, rows, digest(rows), acked=True)
        outputs = compute(state, rows)
        head = (next_tag(tag, position, sent.digest), position + len(rows), outputs[-1])
        self.heads.append(head)
        times_s = (self.now_s, self.now_s + 0.5)
        ack = Reply(epoch, *head[:2], sent, "a", *times_s, outputs.astype(np.float32))
        self.log.sents.append(sent)
        self.log.acks.append(ack)
        self.log.final = Head(epoch, *head[:2])

    def back(self, chunks: int) -> None:
        """The store loses the last chunks."""
        del self.heads[-chunks:]

    def reject(self) -> None:
        """A rejection that names the present head."""
        self.now_s += 1
        head, times_s = self.heads[-1][:2], (self.now_s, self.now_s + 0.5)
        rejection = Reply(EPOCH, *head, self.log.sents[-1], "b", *times_s, code="position_ahead")
        self.log.rejections.append(rejection)
        self.log.noticed_s.append(self.now_s)

    def remove(self) -> None:
        """The stream is deleted, and its client notices."""
        self.now_s += 1
        self.log.removed.append(Span(self.now_s, self.now_s + 0.5))
        self.log.noticed_s.append(self.now_s + 1)
        self.heads = self.heads[:1]

    def kinds(self, *losses: Loss) -> set[str]:
        """Kinds of the checker's findings."""
        return {kind for kind, _ in check(History([self.log], losses=list(losses)))}


def rolled_back() -> tuple[Stream, Loss]:
    """A stream whose last two chunks are rolled back at 12.5 s."""
    stream = Stream()
    stream.back(2)
    return stream, Loss("rolled back", since_s=10.8, struck_s=12.5, until_s=12.6, done_s=12.7)


def test_correct_history_passes() -> None:
    stream = Stream()
    history = History([stream.log])
    assert not check(history)
    assert history.seen[CHECKED] == 12
    stream.log.acks.pop(4)
    stream.log.sents[4].acked = False
    assert not stream.kinds()


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
    rows = np.concatenate(state_after([each.sent.rows for each in stream.log.acks]))
    ack = stream.log.acks[-1]
    wrong = compute(ZERO, rows)[-len(ack.sent.rows) :]
    stream.log.acks[-1] = replace(ack, outputs=wrong.astype(np.float32))
    assert stream.kinds() == {kind}


@pytest.mark.parametrize(
    "change",
    [
        lambda ack: {"outputs": ack.outputs + (np.arange(16) == 7)},
        lambda ack: {"tag": bytes(range(16))},
        lambda ack: {"position": 7},
    ],
    ids=["one output", "tag", "position"],
)
def test_wrong_reply_is_detected(change: Callable[[Reply], dict[str, Any]]) -> None:
    stream = Stream()
    stream.log.acks[5] = replace(stream.log.acks[5], **change(stream.log.acks[5]))
    assert MIXED in stream.kinds()


def test_final_tag_of_no_sent_chunk_is_detected() -> None:
    stream = Stream()
    stream.log.final = replace(stream.log.final, tag=bytes(range(16)))
    assert MIXED in stream.kinds()


@pytest.mark.parametrize(
    ("is_known_loss", "is_noticed", "more", "expected"),
    [
        (True, True, 0, set()),
        (False, True, 0, {LOST}),
        (True, False, 0, {LOST}),
        (True, True, 1, {LOST}),
    ],
    ids=["explained", "no rollback", "client did not notice", "before the rollback"],
)
def test_missing_chunk_is_lost_unless_rolled_back_and_noticed(
    is_known_loss: bool, is_noticed: bool, more: int, expected: set[str]
) -> None:
    stream, loss = rolled_back()
    if more:
        stream.back(more)
    if is_noticed:
        stream.reject()
    stream.chunk()
    history = History([stream.log], losses=[loss] if is_known_loss else [])
    assert {kind for kind, _ in check(history)} == expected
    assert expected or history.seen[ROLLED_BACK] == 2


def test_continued_stale_history_is_detected() -> None:
    """Others advanced the stream after a rollback; a worker continues from its cache."""
    stream, loss = rolled_back()
    stream.reject()
    stream.chunk()
    stream.chunk()
    stream.heads = Stream().heads
    stream.chunk()
    assert stream.kinds(loss) == {LOST}


def test_rejection_that_denies_an_acknowledged_chunk_is_detected() -> None:
    stream = Stream()
    heads = list(stream.heads)
    stream.back(3)
    stream.reject()
    stream.heads = heads
    stream.chunk()
    assert stream.kinds() == {LOST}


def test_rejection_before_a_rollback_is_not_explained_by_it() -> None:
    stream, loss = rolled_back()
    stream.reject()
    stream.chunk()
    assert stream.kinds(replace(loss, until_s=20.0, struck_s=13.0)) == set()
    assert stream.kinds(replace(loss, until_s=20.0, struck_s=14.0)) == {LOST}


def test_removed_stream_starts_a_new_epoch_and_does_not_return() -> None:
    stream = Stream()
    heads = list(stream.heads)
    stream.remove()
    stream.chunk(epoch=OTHER)
    assert stream.kinds() == set()
    stream.heads = heads
    stream.chunk(epoch=EPOCH)
    assert MIXED in stream.kinds()


def test_chunk_lost_before_its_stream_was_removed_is_detected() -> None:
    """Removal explains the end of an epoch, but no missing chunk before it."""
    stream = Stream()
    stream.back(1)
    stream.log.noticed_s.append(stream.now_s + 1)
    stream.chunk()
    stream.remove()
    stream.chunk(epoch=OTHER)
    assert stream.kinds() == {LOST}


@pytest.mark.parametrize(
    ("starts", "unknown", "head", "wrong", "expected"),
    [
        ([0, 3, 6], 0, 9, 0, set()),
        ([0, 3, 9], 1, 12, 0, set()),
        ([0, 3, 3], 0, 6, 0, {LOST}),
        ([0, 3, 6], 0, 6, 0, {LOST}),
        ([0, 3, 6], 0, 12, 0, {DOUBLED}),
        ([0, 3, 6], 0, 9, 1, {MIXED}),
    ],
    ids=["all", "one without answer", "one place twice", "too short", "too long", "other state"],
)
def test_appends_have_distinct_places(
    starts: list[int], unknown: int, head: int, wrong: int, expected: set[str]
) -> None:
    random, state, acks = np.random.default_rng(4), ZERO, []
    for number, start in enumerate(starts):
        sent, tag = Sent(-1, random_events(random, 3), b""), bytes([number] * 16)
        outputs = compute(state, sent.rows)
        state = outputs[-1]
        wrong_outputs = outputs.astype(np.float32) + (wrong if number == 1 else 0)
        acks.append(Reply(EPOCH, tag, start + 3, sent, "a", 1.0, 2.0, wrong_outputs))
    burst = Burst("e", Span(1.0, 2.0), unknown, acks, Head(EPOCH, bytes(16), head))
    assert {kind for kind, _ in check_burst(burst)} == expected
