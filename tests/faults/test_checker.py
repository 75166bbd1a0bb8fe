"""The checker itself: what it lets pass, and that no mistake passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.faults.appends import check_burst
from tests.faults.checker import check
from tests.faults.network import Reference, Rows, random_events
from tests.faults.records import (
    FIRST_TAG,
    Ack,
    AppendAck,
    AppendBurst,
    Head,
    History,
    Loss,
    Rejection,
    Sent,
    Span,
    StreamLog,
    digest,
    next_tag,
)
from tests.faults.result import DOUBLED, LOST, MIXED, CheckResult

CHUNKS = 12
OTHERS = random_events(np.random.default_rng(9), 5)
EPOCH, OTHER = "aa" * 8, "bb" * 8


class Stream:
    """A stream as a faultless service would serve it; one chunk a second."""

    def __init__(self, seed: int = 3):
        self.random = np.random.default_rng(seed)
        self.log = StreamLog("s")
        self.now_s = 0.0
        self.heads = [(FIRST_TAG, 0, Reference().zero())]

    def chunk(self, rows: Rows | None = None, epoch: str = EPOCH) -> Ack:
        """One more chunk, applied and acknowledged."""
        tag, position, state = self.heads[-1]
        rows = random_events(self.random, 5) if rows is None else rows
        self.now_s += 1
        sent = Sent(position, rows, digest(rows), self.now_s, acked=True)
        outputs = Reference().outputs(state, rows)
        after = next_tag(tag, position, sent.digest)
        self.heads.append((after, position + len(rows), outputs[-1]))
        ack = Ack(
            sent,
            "a",
            epoch,
            after,
            position + len(rows),
            outputs.astype(np.float32),
            False,
            self.now_s,
            self.now_s + 0.5,
        )
        self.log.sents.append(sent)
        self.log.acks.append(ack)
        self.log.final = Head(epoch, after, ack.position)
        return ack

    def back(self, chunks: int) -> None:
        """The store loses the last chunks."""
        del self.heads[-chunks:]

    def rejection(
        self, code: str = "position_ahead", worker: str = "a", epoch: str = EPOCH
    ) -> None:
        """A refusal that says the truth."""
        tag, position, _ = self.heads[-1]
        self.now_s += 1
        self.log.rejections.append(
            Rejection(code, worker, epoch, tag, position, self.now_s, self.now_s + 0.5)
        )
        self.log.noticed_s.append(self.now_s)


def served(chunks: int = CHUNKS) -> Stream:
    stream = Stream()
    for _ in range(chunks):
        stream.chunk()
    return stream


def kinds(stream: Stream, *losses: Loss) -> set[str]:
    result = check(History(streams=[stream.log], losses=list(losses)))
    return {finding.kind for finding in result.findings}


def test_correct_history_passes() -> None:
    stream = served()
    result = check(History(streams=[stream.log]))
    assert not result.findings
    assert result.checked_chunks == CHUNKS
    assert result.checked_events == sum(len(sent.rows) for sent in stream.log.sents)


def test_chunk_that_was_applied_without_a_reply_passes() -> None:
    stream = served()
    stream.log.acks.pop(4)
    stream.log.sents[4].acked = False
    assert kinds(stream) == set()


@pytest.mark.parametrize(
    ("state_after", "kind"),
    [
        (lambda chunks: [*chunks[:3], chunks[3], chunks[3], *chunks[4:]], DOUBLED),
        (lambda chunks: [*chunks[:3], *chunks[4:]], LOST),
        (lambda chunks: [*chunks[:3], chunks[4], chunks[3], *chunks[5:]], MIXED),
        (
            lambda chunks: [*chunks[:3], OTHERS, *chunks[4:]],
            MIXED,
        ),
        (lambda chunks: [OTHERS, *chunks], MIXED),
    ],
    ids=["doubled", "lost", "swapped", "wrong", "another's state"],
)
def test_outputs_of_another_state_are_detected_many_chunks_later(
    state_after: Callable[[list[Rows]], list[Rows]], kind: str
) -> None:
    stream = served(40)
    ack = stream.log.acks[-1]
    chunks = [each.sent.rows for each in stream.log.acks]
    rows = np.concatenate(state_after(chunks))
    wrong = Reference().outputs(Reference().zero(), rows)[-len(ack.sent.rows) :]
    stream.log.acks[-1] = replace(ack, outputs=wrong.astype(np.float32))
    assert kinds(stream) == {kind}


def test_one_wrong_number_is_detected() -> None:
    stream = served()
    outputs = stream.log.acks[5].outputs.copy()
    outputs[2, 7] += 1
    stream.log.acks[5] = replace(stream.log.acks[5], outputs=outputs)
    assert kinds(stream) == {MIXED}


def test_tag_or_position_of_no_sent_chunk_is_detected() -> None:
    stream = served()
    stream.log.acks[5] = replace(stream.log.acks[5], tag=bytes(range(16)))
    assert MIXED in kinds(stream)
    stream = served()
    stream.log.acks[5] = replace(stream.log.acks[5], position=7)
    assert kinds(stream) == {MIXED}
    stream = served()
    stream.log.final = replace(stream.log.final, tag=bytes(range(16)))
    assert MIXED in kinds(stream)


def rolled_back() -> tuple[Stream, Loss]:
    """Two chunks are rolled back, and others replace them."""
    stream = served()
    stream.back(2)
    loss = Loss(
        "rolled back",
        stream.now_s - 1.2,
        stream.now_s + 0.5,
        stream.now_s + 0.6,
        stream.now_s + 0.7,
    )
    return stream, loss


def test_rollback_explains_missing_chunks_if_the_client_noticed() -> None:
    stream, loss = rolled_back()
    stream.rejection()
    stream.chunk()
    assert kinds(stream, loss) == set()
    assert check(History([stream.log], losses=[loss])).rolled_back == 2


def test_missing_chunk_without_a_rollback_is_lost() -> None:
    stream, _ = rolled_back()
    stream.rejection()
    stream.chunk()
    assert kinds(stream) == {LOST}


def test_missing_chunk_is_lost_if_the_client_did_not_notice() -> None:
    stream, loss = rolled_back()
    stream.chunk()
    assert kinds(stream, loss) == {LOST}


def test_rollback_explains_nothing_before_it() -> None:
    stream, loss = rolled_back()
    stream.back(1)
    stream.rejection()
    stream.chunk()
    assert kinds(stream, loss) == {LOST}


def test_continued_stale_history_is_detected() -> None:
    """Others advanced the stream after a rollback; a worker continues from its cache."""
    stream, loss = rolled_back()
    stale = list(stream.heads), [*served().heads]
    stream.rejection()
    stream.chunk()
    stream.chunk()
    stream.heads = stale[1]
    stream.chunk()
    assert kinds(stream, loss) == {LOST}


def test_rejection_that_denies_an_acknowledged_chunk_is_detected() -> None:
    stream = served()
    heads = list(stream.heads)
    stream.back(3)
    stream.rejection(worker="b")
    stream.heads = heads
    stream.chunk()
    assert kinds(stream) == {LOST}


def test_removed_stream_starts_a_new_epoch_and_does_not_return() -> None:
    stream = served()
    stream.now_s += 1
    stream.log.removed.append(Span(stream.now_s, stream.now_s + 0.5))
    heads = list(stream.heads)
    stream.heads = stream.heads[:1]
    stream.log.noticed_s.append(stream.now_s + 1)
    stream.chunk(epoch=OTHER)
    assert kinds(stream) == set()
    stream.heads = heads
    stream.chunk(epoch=EPOCH)
    assert MIXED in kinds(stream)


def test_chunk_lost_before_its_stream_was_removed_is_detected() -> None:
    """Removal explains the end of an epoch, but no missing chunk before it."""
    stream = served()
    stream.back(1)
    stream.log.noticed_s.append(stream.now_s + 1)
    stream.chunk()
    stream.now_s += 1
    stream.log.removed.append(Span(stream.now_s, stream.now_s + 0.5))
    stream.log.noticed_s.append(stream.now_s + 1)
    stream.heads = stream.heads[:1]
    stream.chunk(epoch=OTHER)
    assert kinds(stream) == {LOST}


def test_rejection_before_a_rollback_is_not_explained_by_it() -> None:
    stream, loss = rolled_back()
    stream.rejection()
    stream.chunk()
    assert kinds(stream, replace(loss, until_s=20.0, struck_s=13.0)) == set()
    assert kinds(stream, replace(loss, until_s=20.0, struck_s=14.0)) == {LOST}


def burst(places: list[int], unknown: int = 0, head: int | None = None) -> AppendBurst:
    """Appends of three events, acknowledged at these places."""
    random, reference = np.random.default_rng(4), Reference()
    state, acks = reference.zero(), []
    for number, start in enumerate(places):
        rows = random_events(random, 3)
        outputs = reference.outputs(state, rows)
        state = outputs[-1]
        tag = bytes([number] * 16)
        acks.append(AppendAck(rows, EPOCH, tag, start + 3, outputs.astype(np.float32)))
    final = Head(EPOCH, bytes(16), 3 * len(places) if head is None else head)
    return AppendBurst("e", Span(1.0, 2.0), unknown, acks, final)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (burst([0, 3, 6]), set()),
        (burst([0, 3, 9], unknown=1, head=12), set()),
        (burst([0, 3, 3], head=6), {LOST}),
        (burst([0, 3, 6], head=6), {LOST}),
        (burst([0, 3, 6], head=12), {DOUBLED}),
    ],
    ids=["all", "one without answer", "one place twice", "too short", "too long"],
)
def test_appends_have_distinct_places(seen: AppendBurst, expected: set[str]) -> None:
    result = CheckResult()
    check_burst(seen, [], Reference(), result)
    assert {finding.kind for finding in result.findings} == expected


def test_append_from_another_state_is_detected() -> None:
    seen = burst([0, 3, 6])
    seen.acks[1] = replace(seen.acks[1], outputs=seen.acks[1].outputs + 1)
    result = CheckResult()
    check_burst(seen, [], Reference(), result)
    assert {finding.kind for finding in result.findings} == {MIXED}
