"""Checker: was a chunk lost, applied twice, or mixed up? By what the clients saw alone.

Tags are hash chains, so the chunks that were sent determine the possible histories: each chunk that
starts at the position of a known state leads to one further tag. The history of an epoch is the
chain to the stream's final tag, or, where the stream was removed before, to the last tag that was
acknowledged in it. docs/how-to/run-fault-tests.md says what counts as lost, doubled and mixed.

The outputs of every acknowledged chunk, also of those that were rolled back, are compared bit by
bit with whole-number arithmetic (`network.compute`): what an undisturbed service computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.faults.history import FIRST_TAG, Burst, Chunk, History, Reply, StreamLog, next_tag
from tests.faults.network import ZERO, Outputs, compute, turn

LOST: Final = "lost"
DOUBLED: Final = "doubled"
MIXED: Final = "mixed"
CHECKED: Final = "replies checked"
ROLLED_BACK: Final = "acknowledged chunks rolled back by a fault, noticed"
REMOVED: Final = "acknowledged chunks removed with their stream, noticed"
_MOST_STATES: Final = 200_000
_LOOK_BACK: Final = 400  # chunks that are tried as the missing or doubled one
Finding = tuple[str, str]  # the kind of a violation, and what was seen


def check(history: History) -> list[Finding]:
    """The violations in a run; `seen` counts what was checked."""
    findings: list[Finding] = []
    for log in history.streams:
        violations = _StreamCheck(log, history).violations()
        findings += [(kind, f"{log.name}: {what}") for kind, what in violations]
    for burst in history.bursts:
        # not while a fault may have taken acknowledged chunks
        from_s, until_s, _ = burst.span
        if not any(loss.since_s <= until_s and from_s <= loss.done_s for loss in history.losses):
            history.seen["bursts of appends checked"] += 1
            findings += [(kind, f"{burst.stream}: {what}") for kind, what in check_burst(burst)]
    return findings


def check_burst(burst: Burst) -> Iterator[Finding]:
    """Check that each acknowledged append has a place of its own, after the ones before it.

    Where chunks got no reply, the stream may be longer than the acknowledged ones.
    """
    acks = sorted(burst.acks, key=lambda ack: ack.position)
    places = [(ack.position - len(ack.chunk.rows), ack.position) for ack in acks]
    for before, after in pairwise(places):
        if after[0] < before[1]:
            yield LOST, f"two appends were acknowledged for {before} and {after}"
            return
    if len({ack.epoch for ack in acks}) > 1 or len({ack.tag for ack in acks}) < len(acks):
        yield MIXED, "appends were acknowledged in two epochs, or under one tag"
    applied, position = sum(len(ack.chunk.rows) for ack in acks), burst.final.position
    if position < applied or (position > applied and not burst.unknown):
        kind = LOST if position < applied else DOUBLED
        yield kind, f"is at {position} after {applied} events were acknowledged"
    state, at = ZERO, 0
    for ack, (start, end) in zip(acks, places, strict=True):
        if start != at:
            return
        outputs = compute(state, ack.chunk.rows)
        if not np.array_equal(ack.outputs, outputs):
            yield MIXED, f"the append at {start} has outputs that do not follow"
            return
        state, at = outputs[-1], end


@dataclass(slots=True, eq=False, repr=False)
class _Node:
    """A state that the stream may have had: the chunks that lead to it."""

    tag: bytes
    position: int
    before: _Node | None = None
    chunk: Chunk | None = None
    outputs: NDArray[np.int64] | None = None  # [T, H] of the last chunk, once they were computed

    def chain(self) -> list[_Node]:
        """The states from the first chunk's to this one."""
        chain, at = [], self
        while at.before is not None:
            chain.append(at)
            at = at.before
        return chain[::-1]

    def compute(self) -> NDArray[np.int64]:
        """Outputs of the last chunk; each chunk of the chain is computed once."""
        for node in self.chain() if self.outputs is None else ():
            if node.outputs is None:
                node.outputs = compute(node.before.outputs[-1], node.chunk.rows)
        return self.outputs


class _StreamCheck:
    """Finds the violations in one stream."""

    def __init__(self, log: StreamLog, history: History):
        self._log, self._history = log, history
        seen = {head.tag for head in (*log.acks, log.final) if head.tag is not None}
        self._nodes = _states(log, seen | {each.tag for each in log.rejections})
        if not seen <= self._nodes.keys():
            self._nodes = _states(log, None)
        ends = {ack.epoch: ack.tag for ack in sorted(log.acks, key=lambda ack: ack.at_s)}
        if log.final.tag is not None:
            ends[log.final.epoch] = log.final.tag
        self._chains = {
            epoch: {node.tag for node in self._nodes[tag].chain()} if tag in self._nodes else set()
            for epoch, tag in ends.items()
        }
        self._removed_s = {
            ack.epoch: span.until_s
            for span in log.removed
            for ack in log.acks
            if span.sure and ack.at_s <= span.from_s
        }

    def violations(self) -> Iterator[Finding]:
        """Check the stream's end, then each of its replies."""
        final = self._log.final
        node = self._nodes.get(final.tag) if final.tag else self._nodes[FIRST_TAG]
        if node is None or node.position != final.position:
            yield MIXED, f"is at {final}, which no chain of sent chunks gives"
        for ack in self._log.acks:
            yield from self._check_outputs(ack)
            yield from self._check_survival(ack)
            yield from self._check_epoch(ack)
        for rejection in self._log.rejections:
            yield from self._check_rejection(rejection)

    def _check_outputs(self, ack: Reply) -> Iterator[Finding]:
        """Tag, position and outputs against the chunks that lead to the tag."""
        self._history.seen[CHECKED] += 1
        self._history.seen["events checked"] += len(ack.chunk.rows)
        node, what = self._nodes.get(ack.tag), self._describe(ack)
        if node is None:
            yield MIXED, f"{what}: its tag is that of no chain of sent chunks"
        elif ack.position != node.position or ack.chunk.digest != node.chunk.digest:
            yield MIXED, f"{what} with {ack.position}: its tag is another chunk's"
        elif not np.array_equal(ack.outputs, node.compute()):
            kind, why = _explain(node, ack.outputs)
            yield kind, f"{what}: its outputs {why}"

    def _check_survival(self, ack: Reply) -> Iterator[Finding]:
        """A missing chunk was rolled back or removed, and its client noticed."""
        in_epoch = ack.tag in self._chains[ack.epoch]
        if in_epoch and ack.epoch == self._log.final.epoch:
            return
        is_removed = in_epoch and self._may_be_removed(ack)
        what = f"{self._describe(ack)}, did not survive"
        if not is_removed and not self._may_be_rolled_back(ack):
            yield LOST, what
        elif not any(at_s >= ack.at_s for at_s in self._log.noticed_s):
            yield LOST, f"{what}, and its client did not notice"
        else:
            self._history.seen[REMOVED if is_removed else ROLLED_BACK] += 1

    def _check_epoch(self, ack: Reply) -> Iterator[Finding]:
        """The epoch of a removed stream does not come back, unless the store rolled back."""
        ended_s = self._removed_s.get(ack.epoch)
        if ended_s is None or ack.sent_s <= ended_s or ack.replayed:
            return
        if not any(loss.since_s <= ended_s <= loss.done_s for loss in self._history.losses):
            yield MIXED, f"{self._describe(ack)}, in the epoch of a stream that was removed"

    def _check_rejection(self, rejection: Reply) -> Iterator[Finding]:
        """A rejection does not deny what was acknowledged before it was asked for."""
        before = (ack for ack in self._log.acks if ack.at_s < rejection.sent_s)
        last, at_s = max(before, key=lambda ack: ack.at_s, default=rejection), rejection.at_s
        if rejection.epoch == last.epoch and rejection.position >= last.position:
            return
        if not self._may_be_rolled_back(last, at_s) and not self._may_be_removed(last, at_s):
            answer = f"{rejection.worker} answered {rejection.code} {self._at(at_s)}"
            where = f"with position {rejection.position} after the {self._describe(last)}"
            yield LOST, f"{answer} {where}"

    def _may_be_rolled_back(self, ack: Reply, until_s: float = float("inf")) -> bool:
        """Whether a fault before `until_s` may have rolled it back."""
        return any(
            loss.since_s <= ack.at_s and ack.sent_s <= loss.until_s and loss.struck_s <= until_s
            for loss in self._history.losses
        )

    def _may_be_removed(self, ack: Reply, until_s: float = float("inf")) -> bool:
        return any(
            ack.sent_s <= span.until_s and span.from_s <= until_s for span in self._log.removed
        )

    def _describe(self, ack: Reply) -> str:
        return f"chunk at {ack.chunk.start}, acknowledged by {ack.worker} {self._at(ack.at_s)}"

    def _at(self, moment_s: float) -> str:
        return f"at {moment_s - self._history.began_s:.2f} s"


def _states(log: StreamLog, seen: set[bytes | None] | None) -> dict[bytes, _Node]:
    """The states that chunks lead to, by tag. Acknowledged chunks lead to no other tag than those
    that were `seen`; None: to any."""
    acked = {ack.chunk for ack in log.acks}
    by_start: dict[int, dict[bytes, Chunk]] = defaultdict(dict)
    # of equal chunks, one that was not acknowledged comes first: it may lead anywhere
    for chunk in sorted(log.sent, key=acked.__contains__):
        by_start[chunk.start].setdefault(chunk.digest, chunk)
    root = _Node(FIRST_TAG, 0, outputs=ZERO[np.newaxis])
    nodes = {FIRST_TAG: root}
    at = defaultdict(list, {0: [root]})
    for start in sorted(by_start):
        for node in at[start]:
            for digest, chunk in by_start[start].items():
                tag = next_tag(node.tag, start, digest)
                if tag in nodes or (seen is not None and chunk in acked and tag not in seen):
                    continue
                if len(nodes) >= _MOST_STATES:
                    return nodes
                nodes[tag] = _Node(tag, start + len(chunk.rows), node, chunk)
                at[nodes[tag].position].append(nodes[tag])
    return nodes


def _explain(node: _Node, seen: Outputs) -> Finding:
    """Which kind of mistake gives these outputs: the difference says it, since nothing fades."""
    outputs = node.compute()
    if seen.shape != outputs.shape:
        return MIXED, f"are of shape {list(seen.shape)}, expected {list(outputs.shape)}"
    difference = seen[-1].astype(np.int64) - outputs[-1]
    for each in node.chain()[-_LOOK_BACK:]:
        state, later = each.outputs[-1], node.position - each.position
        twice = compute(state, each.chunk.rows)[-1]
        if (difference == turn(twice - state, later)).all():
            return DOUBLED, f"are as if the chunk at {each.chunk.start} were applied twice"
        if (difference == turn(each.before.outputs[-1] - state, later)).all():
            return LOST, f"are as if the chunk at {each.chunk.start} were missing"
    return MIXED, f"differ by up to {np.abs(difference).max()}"
