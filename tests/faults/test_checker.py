"""The checker itself: what it lets pass, and that no mistake passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.faults.checker import check
from tests.faults.episodes import check_episode
from tests.faults.network import Reference, Rows, random_events
from tests.faults.records import (
    FIRST_TAG,
    Ack,
    AppendAck,
    Episode,
    History,
    Loss,
    Sent,
    Span,
    Standing,
    StreamLog,
    Told,
    digest,
    next_tag,
)
from tests.faults.verdict import DOUBLED, LOST, MIXED, Verdict

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
        self.log.final = Standing(epoch, after, ack.position)
        return ack

    def back(self, chunks: int) -> None:
        """The store forgets the last chunks."""
        del self.heads[-chunks:]

    def told(self, code: str = "position_ahead", worker: str = "a", epoch: str = EPOCH) -> None:
        """A refusal that says the truth."""
        tag, position, _ = self.heads[-1]
        self.now_s += 1
        self.log.tolds.append(
            Told(code, worker, epoch, tag, position, self.now_s, self.now_s + 0.5)
        )
        self.log.noticed_s.append(self.now_s)


def served(chunks: int = CHUNKS) -> Stream:
    stream = Stream()
    for _ in range(chunks):
        stream.chunk()
    return stream


def kinds(stream: Stream, *losses: Loss) -> set[str]:
    verdict = check(History(streams=[stream.log], losses=list(losses)))
    return {finding.kind for finding in verdict.findings}


def test_a_faultless_history_passes_and_is_found_whole() -> None:
    stream = served()
    verdict = check(History(streams=[stream.log]))
    assert not verdict.findings
    assert verdict.checked_chunks == CHUNKS
    assert [node.sent for node in verdict.histories["s", EPOCH]] == stream.log.sents


def test_a_chunk_that_was_applied_without_an_answer_is_found() -> None:
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
def test_outputs_from_another_state_are_found_long_after(
    state_after: Callable[[list[Rows]], list[Rows]], kind: str
) -> None:
    stream = served(40)
    ack = stream.log.acks[-1]
    chunks = [each.sent.rows for each in stream.log.acks]
    rows = np.concatenate(state_after(chunks))
    wrong = Reference().outputs(Reference().zero(), rows)[-len(ack.sent.rows) :]
    stream.log.acks[-1] = replace(ack, outputs=wrong.astype(np.float32))
    assert kinds(stream) == {kind}


def test_one_wrong_number_is_found() -> None:
    stream = served()
    outputs = stream.log.acks[5].outputs.copy()
    outputs[2, 7] += 1
    stream.log.acks[5] = replace(stream.log.acks[5], outputs=outputs)
    assert kinds(stream) == {MIXED}


def test_a_tag_or_a_position_of_nothing_that_was_sent_is_found() -> None:
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
    """Two chunks are taken away by a rollback, and others come in their place."""
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


def test_a_rollback_explains_what_it_took_where_the_client_was_told() -> None:
    stream, loss = rolled_back()
    stream.told()
    stream.chunk()
    assert kinds(stream, loss) == set()
    assert check(History([stream.log], losses=[loss])).taken == 2


def test_without_a_rollback_it_is_lost() -> None:
    stream, _ = rolled_back()
    stream.told()
    stream.chunk()
    assert kinds(stream) == {LOST}


def test_a_client_that_was_not_told_lost_it() -> None:
    stream, loss = rolled_back()
    stream.chunk()
    assert kinds(stream, loss) == {LOST}


def test_a_rollback_explains_nothing_from_before_it() -> None:
    stream, loss = rolled_back()
    stream.back(1)
    stream.told()
    stream.chunk()
    assert kinds(stream, loss) == {LOST}


def test_a_stale_history_that_goes_on_is_found() -> None:
    """Others moved the stream on after a rollback; a worker goes on from what it remembers."""
    stream, loss = rolled_back()
    stale = list(stream.heads), [*served().heads]
    stream.told()
    stream.chunk()
    stream.chunk()
    stream.heads = stale[1]
    stream.chunk()
    assert kinds(stream, loss) == {LOST}


def test_a_refusal_that_denies_what_was_acknowledged_is_found() -> None:
    stream = served()
    heads = list(stream.heads)
    stream.back(3)
    stream.told(worker="b")
    stream.heads = heads
    stream.chunk()
    assert kinds(stream) == {LOST}


def test_a_forgotten_stream_begins_anew_and_does_not_come_back() -> None:
    stream = served()
    stream.now_s += 1
    stream.log.forgotten.append(Span(stream.now_s, stream.now_s + 0.5))
    heads = list(stream.heads)
    stream.heads = stream.heads[:1]
    stream.log.noticed_s.append(stream.now_s + 1)
    stream.chunk(epoch=OTHER)
    assert kinds(stream) == set()
    stream.heads = heads
    stream.chunk(epoch=EPOCH)
    assert MIXED in kinds(stream)


def test_a_chunk_lost_before_its_stream_was_forgotten_is_found() -> None:
    """Being forgotten explains the end of an epoch, and nothing that was missing in it."""
    stream = served()
    stream.back(1)
    stream.log.noticed_s.append(stream.now_s + 1)
    stream.chunk()
    stream.now_s += 1
    stream.log.forgotten.append(Span(stream.now_s, stream.now_s + 0.5))
    stream.log.noticed_s.append(stream.now_s + 1)
    stream.heads = stream.heads[:1]
    stream.chunk(epoch=OTHER)
    assert kinds(stream) == {LOST}


def test_a_refusal_before_a_rollback_struck_is_not_explained_by_it() -> None:
    stream, loss = rolled_back()
    stream.told()
    stream.chunk()
    assert kinds(stream, replace(loss, until_s=20.0, struck_s=13.0)) == set()
    assert kinds(stream, replace(loss, until_s=20.0, struck_s=14.0)) == {LOST}


def episode(places: list[int], unknown: int = 0, standing: int | None = None) -> Episode:
    """Appends of three events, acknowledged at these places."""
    random, reference = np.random.default_rng(4), Reference()
    state, acks = reference.zero(), []
    for number, start in enumerate(places):
        rows = random_events(random, 3)
        outputs = reference.outputs(state, rows)
        state = outputs[-1]
        tag = bytes([number] * 16)
        acks.append(AppendAck(rows, "a", EPOCH, tag, start + 3, outputs.astype(np.float32)))
    final = Standing(EPOCH, bytes(16), 3 * len(places) if standing is None else standing)
    return Episode("e", Span(1.0, 2.0), len(places) + unknown, unknown, acks, final)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (episode([0, 3, 6]), set()),
        (episode([0, 3, 9], unknown=1, standing=12), set()),
        (episode([0, 3, 3], standing=6), {LOST}),
        (episode([0, 3, 6], standing=6), {LOST}),
        (episode([0, 3, 6], standing=12), {DOUBLED}),
    ],
    ids=["all", "one without answer", "one place twice", "too short", "too long"],
)
def test_appends_have_places_of_their_own(seen: Episode, expected: set[str]) -> None:
    verdict = Verdict()
    check_episode(seen, [], Reference(), verdict)
    assert {finding.kind for finding in verdict.findings} == expected


def test_an_append_from_another_state_is_found() -> None:
    seen = episode([0, 3, 6])
    seen.acks[1] = replace(seen.acks[1], outputs=seen.acks[1].outputs + 1)
    verdict = Verdict()
    check_episode(seen, [], Reference(), verdict)
    assert {finding.kind for finding in verdict.findings} == {MIXED}
