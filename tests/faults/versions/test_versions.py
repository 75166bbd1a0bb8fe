"""The check of versions finds every mistake, and a short run has none."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.faults.checker import DOUBLED, LOST, MIXED, Finding
from tests.faults.deployment import MOST_RUNS
from tests.faults.history import FIRST_TAG, Chunk, Head, Reply, next_tag
from tests.faults.network import ZERO, compute, random_events
from tests.faults.planted_bugs.sitecustomize import VERSION_CODE
from tests.faults.run import report
from tests.faults.versions.check import EXACT, Stream, check
from tests.faults.versions.run import describe_failures, kinds_of, options_of, run
from tests.support.needs import needs_redis

GAINS = {"one": 1, "two": 2}
BURN_IN = 20
STEPS = 4  # of each chunk
EPOCH = "aa" * 8
SHORT_PLAN = [(action, "a") for action in ("load", "canary", "promote", "rollback")]


def serve(*answers: tuple[str, int, bool]) -> Stream:
    """A stream whose chunks were answered by a version, from a state since a position, which the
    reply announces or not."""
    random, stream, rows, tag = np.random.default_rng(5), Stream("s"), [], FIRST_TAG
    for start, (version, since, announces) in zip(
        range(0, STEPS * len(answers), STEPS), answers, strict=True
    ):
        chunk = Chunk("s", start, random_events(random, STEPS))
        rows.append(chunk.rows)
        outputs = GAINS[version] * compute(ZERO, np.concatenate(rows)[since:])[-STEPS:]
        tag = next_tag(tag, start, chunk.digest)
        head, warm = (EPOCH, tag, start + STEPS), (start - since, BURN_IN) if announces else None
        stream.chunks.append(chunk)
        stream.replies.append(
            Reply(*head, chunk, "w", 0.0, 0.0, outputs, version=version, warm=warm)
        )
    stream.final = Head(*head)
    return stream


def findings_of(stream: Stream) -> list[Finding]:
    return check(stream, GAINS, BURN_IN, Counter())


def change(stream: Stream, at: int, **changes: object) -> list[Finding]:
    """The findings once one reply was another."""
    stream.replies[at] = replace(stream.replies[at], **changes)
    return findings_of(stream)


ALL_EXACT = [("one", 0, False), ("two", 0, False)] * 5


@pytest.mark.parametrize("version", ["two", "three"])
def test_outputs_of_another_version_are_found(version: str) -> None:
    [(kind, _)] = change(serve(*ALL_EXACT), 4, version=version)
    assert kind == MIXED


def test_an_inexact_state_that_is_not_announced_is_found() -> None:
    [(kind, what)] = findings_of(serve(*ALL_EXACT[:3], ("one", 4, False)))
    assert kind == MIXED
    assert "since 4" in what


@pytest.mark.parametrize("at", [1, 5])
def test_outputs_without_an_event_or_with_one_twice_are_found(at: int) -> None:
    stream = serve(*ALL_EXACT)
    rows = [chunk.rows for chunk in stream.chunks]
    for others in (rows[:at] + rows[at + 1 :], [*rows[: at + 1], *rows[at:]]):
        outputs = compute(ZERO, np.concatenate(others))[-STEPS:]
        [(kind, _)] = change(serve(*ALL_EXACT), -1, outputs=2 * outputs)
        assert kind == MIXED


def test_lost_and_doubled_chunks_are_found() -> None:
    stream = serve(*ALL_EXACT)
    assert [kind for kind, _ in change(stream, 3, position=12)] == [LOST]
    stream = serve(*ALL_EXACT)
    assert [kind for kind, _ in change(stream, 3, position=20)] == [DOUBLED]
    stream = serve(*ALL_EXACT)
    assert [kind for kind, _ in change(stream, 3, code="position_ahead")] == [LOST]
    stream = serve(*ALL_EXACT)
    stream.final = Head(EPOCH, bytes(16), stream.final.position)
    assert [kind for kind, _ in findings_of(stream)] == [LOST]


@pytest.mark.harness
@needs_redis
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bug", VERSION_CODE)
async def test_planted_bug_is_detected(bug: str) -> None:
    found = set[str]()
    for _ in range(MOST_RUNS):
        options = options_of("redis", streams=24, events=800, transports=("json",), plant=bug)
        _, findings = await run(options, SHORT_PLAN)
        found = {kind for kind, _ in findings}
        if MIXED in found:
            break
    assert MIXED in found


@needs_redis
async def test_versions_change_while_workers_and_the_store_are_killed() -> None:
    options = options_of("redis", streams=24, events=800, longest_s=0.5)
    history, findings = await run(options, SHORT_PLAN)
    print(*report(options, history, findings), sep="\n")
    assert describe_failures(options, history, findings) == []
    assert history.seen.keys() >= {EXACT, *kinds_of("redis")}
