"""Was anything lost, applied twice, or mixed? From what the clients saw, and nothing else.

Tags are hash chains, so the chunks that were sent say which histories there can have been: from
the beginning, each chunk that starts where a known state stands leads to one further tag. The
surviving history is the way to the tag at which the stream stood at the end. Then

    mixed      an acknowledged tag that no chain of sent chunks gives; outputs, a position or an
               epoch that are not those of the chunks on the way to that tag; a forgotten
               stream's epoch that comes back
    doubled    outputs as if one chunk on the way had been applied twice
    lost       an acknowledged chunk outside the surviving history, unless a fault that may take
               it away came between, or the stream was forgotten, and its client noticed; outputs
               as if one chunk on the way were missing; two appends acknowledged for one place;
               a refusal that denies what was acknowledged before

The outputs of every acknowledged chunk, also of those that were rolled back, are compared with
whole-number arithmetic (`network.Reference`), the surviving ones also with an undisturbed
service (`undisturbed`). Both comparisons are bit by bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.faults.network import Reference
from tests.faults.records import (
    FIRST_TAG,
    Ack,
    Episode,
    History,
    Loss,
    Sent,
    Standing,
    StreamLog,
    Told,
    next_tag,
)

LOST: Final = "lost"
DOUBLED: Final = "doubled"
MIXED: Final = "mixed"

_MOST_STATES: Final = 200_000
_LOOK_BACK: Final = 400
"""Chunks that are tried as the missing or doubled one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must never be."""

    kind: str
    stream: str
    what: str


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """A state that the stream may have been in: the chunks that lead to it.

    Attributes:
        before: the state before the last chunk; None at the beginning.
        outputs: int64 [T, H] of the last chunk, once they were computed.
    """

    tag: bytes
    position: int
    before: Node | None = None
    sent: Sent | None = None
    outputs: NDArray[np.int64] | None = None


@dataclass(slots=True)
class Verdict:
    """Of one run.

    Attributes:
        surviving: of each stream that stands at the end, its chunks and their tags.
        explained: acknowledged chunks that a fault took away, with their clients told.
    """

    findings: list[Finding] = field(default_factory=list)
    surviving: dict[str, list[Node]] = field(default_factory=dict)
    explained: int = 0
    checked_chunks: int = 0
    checked_events: int = 0
    episodes: int = 0

    def count(self, kind: str) -> int:
        """Findings of a kind."""
        return sum(finding.kind == kind for finding in self.findings)


def check(history: History) -> Verdict:
    """Judge all streams and all episodes of a run."""
    verdict = Verdict()
    reference = Reference()
    for log in history.streams:
        _StreamCheck(log, history.losses, reference, verdict).run()
    for episode in history.episodes:
        check_episode(episode, history.losses, reference, verdict)
    return verdict


class _StreamCheck:
    def __init__(self, log: StreamLog, losses: list[Loss], reference: Reference, verdict: Verdict):
        self._log = log
        self._losses = losses
        self._reference = reference
        self._verdict = verdict
        self._nodes: dict[bytes, Node] = {}

    def run(self) -> None:
        self._find_states()
        way = self._surviving()
        for ack in self._log.acks:
            self._check_ack(ack)
        self._check_survival(way)
        self._check_forgotten()
        self._check_refusals()

    def _find(self, kind: str, what: str) -> None:
        self._verdict.findings.append(Finding(kind, self._log.name, what))

    def _find_states(self) -> None:
        """Every state that was seen; where the end cannot be reached by them, every one that
        can have been."""
        log = self._log
        seen = {ack.tag for ack in log.acks} | {told.tag for told in log.tolds}
        if log.final is not None:
            seen.add(log.final.tag)
        self._nodes = _states(log.sents, seen)
        wanted = {ack.tag for ack in log.acks}
        if log.final is not None:
            wanted.add(log.final.tag)
        if not wanted <= self._nodes.keys():
            self._nodes = _states(log.sents, None)

    def _surviving(self) -> set[bytes]:
        """The tags on the way to where the stream stands."""
        final = self._log.final
        if final is None or final.tag == FIRST_TAG:
            return set()
        node = self._nodes.get(final.tag)
        if node is None:
            self._find(MIXED, f"stands at {_place(final)}, which no chain of sent chunks gives")
            return set()
        if node.position != final.position:
            self._find(MIXED, f"stands at {_place(final)}, its chunks end at {node.position}")
        way = list(_way(node))
        self._verdict.surviving[self._log.name] = way
        return {each.tag for each in way}

    def _check_ack(self, ack: Ack) -> None:
        """Tag, position and outputs against the chunks that lead to the tag."""
        verdict = self._verdict
        verdict.checked_chunks += 1
        verdict.checked_events += len(ack.sent.rows)
        node = self._nodes.get(ack.tag)
        what = f"chunk at {ack.sent.start}, acknowledged by {ack.worker}"
        if node is None:
            self._find(MIXED, f"{what}: its tag is that of no chain of sent chunks")
            return
        if ack.position != node.position or ack.sent.digest != node.sent.digest:
            self._find(MIXED, f"{what} with {ack.position}: its tag is another chunk's")
            return
        outputs = _outputs(node, self._reference)
        if ack.outputs.shape == outputs.shape and (ack.outputs == outputs).all():
            return
        kind, why = _explain(node, ack.outputs, self._reference)
        self._find(kind, f"{what}: its outputs {why}")

    def _check_survival(self, way: set[bytes]) -> None:
        """Acknowledged chunks outside the surviving history, and what may have taken them."""
        final = self._log.final
        for ack in self._log.acks:
            if ack.tag in way and final is not None and ack.epoch == final.epoch:
                continue
            what = f"chunk at {ack.sent.start}, acknowledged by {ack.worker}, did not survive"
            if not (self._taken(ack) or self._forgotten_after(ack)):
                self._find(LOST, what)
            elif not any(at_s >= ack.at_s for at_s in self._log.noticed_s):
                self._find(LOST, f"{what}, and its client was not told")
            else:
                self._verdict.explained += 1

    def _taken(self, ack: Ack, until_s: float = float("inf")) -> bool:
        """Whether a fault before `until_s` may have taken it away."""
        return any(
            loss.since_s <= ack.at_s and ack.sent_s <= loss.until_s <= until_s
            for loss in self._losses
        )

    def _forgotten_after(self, ack: Ack, until_s: float = float("inf")) -> bool:
        return any(
            ack.sent_s <= span.until_s and span.from_s <= until_s for span in self._log.forgotten
        )

    def _check_forgotten(self) -> None:
        """The epoch of a forgotten stream does not come back, unless the store rolled back."""
        ended: dict[str, float] = {}
        for span in self._log.forgotten:
            for ack in self._log.acks if span.sure else ():
                if ack.at_s <= span.from_s:
                    ended[ack.epoch] = span.until_s
        for ack in self._log.acks:
            ended_s = ended.get(ack.epoch)
            if ended_s is None or ack.sent_s <= ended_s or ack.replayed:
                continue
            if not any(loss.since_s <= ended_s <= loss.done_s for loss in self._losses):
                self._find(
                    MIXED,
                    f"chunk at {ack.sent.start}, acknowledged by {ack.worker} in the epoch of a "
                    "stream that was forgotten",
                )

    def _check_refusals(self) -> None:
        """No refusal denies what was acknowledged before it was asked for."""
        acks = sorted(self._log.acks, key=lambda ack: ack.at_s)
        for told in self._log.tolds:
            last = _last_before(acks, told)
            if last is None or (told.epoch == last.epoch and told.position >= last.position):
                continue
            if self._taken(last, told.at_s) or self._forgotten_after(last, told.at_s):
                continue
            self._find(
                LOST,
                f"{told.worker} answered {told.code} with position {told.position}, after "
                f"{last.position} was acknowledged by {last.worker}",
            )


def _states(sents: Iterable[Sent], seen: set[bytes | None] | None) -> dict[bytes, Node]:
    """The states that chunks lead to, by tag.

    Args:
        seen: tags that were seen. Acknowledged chunks lead to no other; None: to any.
    """
    by_start: dict[int, dict[bytes, Sent]] = defaultdict(dict)
    for sent in sents:
        known = by_start[sent.start].setdefault(sent.digest, sent)
        if known.acked and not sent.acked:
            by_start[sent.start][sent.digest] = sent
    root = Node(FIRST_TAG, 0)
    nodes = {FIRST_TAG: root}
    at = {0: [root]}
    for start in sorted(by_start):
        for node in at.get(start, []):
            for chunk, sent in by_start[start].items():
                tag = next_tag(node.tag, start, chunk)
                if tag in nodes or (seen is not None and sent.acked and tag not in seen):
                    continue
                if len(nodes) >= _MOST_STATES:
                    return nodes
                following = Node(tag, start + len(sent.rows), node, sent)
                nodes[tag] = following
                at.setdefault(following.position, []).append(following)
    return nodes


def _way(node: Node) -> Iterable[Node]:
    """From the first chunk to this one."""
    way = []
    at: Node | None = node
    while at is not None and at.sent is not None:
        way.append(at)
        at = at.before
    return reversed(way)


def _outputs(node: Node, reference: Reference) -> NDArray[np.int64]:
    """What the chunks on the way give; each chunk is computed once."""
    missing = []
    at: Node | None = node
    while at is not None and at.sent is not None and at.outputs is None:
        missing.append(at)
        at = at.before
    for each in reversed(missing):
        before = each.before
        state = reference.zero() if before.outputs is None else before.outputs[-1]
        each.outputs = reference.outputs(state, each.sent.rows)
    return node.outputs


def _explain(node: Node, found: NDArray[np.float32], reference: Reference) -> tuple[str, str]:
    """Which kind of mistake gives these outputs: the difference says it, since nothing fades."""
    outputs = _outputs(node, reference)
    if found.shape != outputs.shape:
        return MIXED, f"are of shape {list(found.shape)}, expected {list(outputs.shape)}"
    difference = found[-1].astype(np.int64) - outputs[-1]
    way = list(_way(node))
    for each in way[-_LOOK_BACK:]:
        state, later = each.outputs[-1], node.position - each.position
        twice = reference.outputs(state, each.sent.rows)[-1]
        if (difference == reference.turned(twice - state, later)).all():
            return DOUBLED, f"are as if the chunk at {each.sent.start} were applied twice"
        first = each.before.outputs is None
        without = reference.zero() if first else each.before.outputs[-1]
        if (difference == reference.turned(without - state, later)).all():
            return LOST, f"are as if the chunk at {each.sent.start} were missing"
    return MIXED, f"differ by up to {np.abs(difference).max()}"


def _last_before(acks: list[Ack], told: Told) -> Ack | None:
    """The last answer that came before a refusal was asked for."""
    found = None
    for ack in acks:
        if ack.at_s >= told.sent_s:
            break
        found = ack
    return found


def _place(standing: Standing) -> str:
    return f"position {standing.position} of epoch {standing.epoch}"


def check_episode(
    episode: Episode, losses: list[Loss], reference: Reference, verdict: Verdict
) -> None:
    """Each acknowledged append has a place of its own, after the ones before it.

    Where chunks got no reply, or a fault may have taken some away, only the acknowledged ones
    are held against each other.
    """
    verdict.episodes += 1
    span = episode.span
    if any(loss.since_s <= span.until_s and span.from_s <= loss.done_s for loss in losses):
        return
    acks = sorted(episode.acks, key=lambda ack: ack.position)
    places = [(ack.position - len(ack.rows), ack.position) for ack in acks]

    def find(kind: str, what: str) -> None:
        verdict.findings.append(Finding(kind, episode.name, what))

    for before, after in pairwise(places):
        if after[0] < before[1]:
            find(LOST, f"two appends were acknowledged for {before} and {after}")
            return
    if len({ack.epoch for ack in acks}) > 1 or len({ack.tag for ack in acks}) < len(acks):
        find(MIXED, "appends were acknowledged in two epochs, or under one tag")
    applied = sum(len(ack.rows) for ack in acks)
    standing = episode.final.position if episode.final is not None else 0
    if standing < applied or (not episode.unknown and standing != applied):
        find(LOST, f"stands at {standing} after {applied} events were acknowledged")
    state, at = reference.zero(), 0
    for ack, (start, end) in zip(acks, places, strict=True):
        if start != at:
            return
        outputs = reference.outputs(state, ack.rows)
        if (ack.outputs != outputs).any():
            find(MIXED, f"the append at {start} has outputs that do not follow")
            return
        state, at = outputs[-1], end
