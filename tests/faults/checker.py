"""Was anything lost, applied twice, or mixed? From what the clients saw, and nothing else.

Tags are hash chains, so the chunks that were sent say which histories there can have been: from
the beginning, each chunk that starts where a known state stands leads to one further tag. The
history of an epoch is the way to the tag at which the stream stood at the end, or, where the
stream was forgotten before, to the last tag that was acknowledged in it. Then

    mixed      an acknowledged tag that no chain of sent chunks gives; outputs, a position or an
               epoch that are not those of the chunks on the way to that tag; a forgotten
               stream's epoch that comes back
    doubled    outputs as if one chunk on the way had been applied twice
    lost       an acknowledged chunk outside the history of its epoch, unless a fault that may
               take it away came between and its client noticed; an epoch that ended otherwise
               than by such a fault or because the stream was forgotten; outputs as if one chunk
               on the way were missing; two appends acknowledged for one place; a refusal that
               denies what was acknowledged before

The outputs of every acknowledged chunk, also of those that were rolled back, are compared with
whole-number arithmetic (`network.Reference`), those of each epoch's history also with an
undisturbed service (`undisturbed`). Both comparisons are bit by bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.faults.episodes import check_episode
from tests.faults.network import Reference
from tests.faults.records import (
    FIRST_TAG,
    Ack,
    History,
    Sent,
    Standing,
    StreamLog,
    Told,
    next_tag,
)
from tests.faults.verdict import DOUBLED, LOST, MIXED, Finding, Node, Verdict

_MOST_STATES: Final = 200_000
_LOOK_BACK: Final = 400
"""Chunks that are tried as the missing or doubled one."""


def check(history: History) -> Verdict:
    """Judge all streams and all episodes of a run."""
    verdict = Verdict()
    reference = Reference()
    for log in history.streams:
        _StreamCheck(log, history, reference, verdict).run()
    for episode in history.episodes:
        check_episode(episode, history.losses, reference, verdict)
    return verdict


class _StreamCheck:
    def __init__(self, log: StreamLog, history: History, reference: Reference, verdict: Verdict):
        self._log = log
        self._losses = history.losses
        self._began_s = history.began_s
        self._reference = reference
        self._verdict = verdict
        self._nodes: dict[bytes, Node] = {}

    def run(self) -> None:
        self._find_states()
        ways = self._histories()
        for ack in self._log.acks:
            self._check_ack(ack)
        self._check_survival(ways)
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

    def _histories(self) -> dict[str, set[bytes]]:
        """The tags on the way to where each epoch stands, or stood last."""
        final = self._log.final
        ends = {ack.epoch: ack.tag for ack in sorted(self._log.acks, key=lambda ack: ack.at_s)}
        if final is not None:
            ends[final.epoch] = final.tag
            node = self._nodes.get(final.tag)
            if node is None:
                self._find(MIXED, f"stands at {_place(final)}, which no chain of sent chunks gives")
            elif node.position != final.position:
                self._find(MIXED, f"stands at {_place(final)}, its chunks end at {node.position}")
        found = {}
        for epoch, tag in ends.items():
            way = list(_way(self._nodes[tag])) if tag in self._nodes else []
            self._verdict.histories[self._log.name, epoch] = way
            found[epoch] = {node.tag for node in way}
        return found

    def _check_ack(self, ack: Ack) -> None:
        """Tag, position and outputs against the chunks that lead to the tag."""
        verdict = self._verdict
        verdict.checked_chunks += 1
        verdict.checked_events += len(ack.sent.rows)
        node = self._nodes.get(ack.tag)
        what = self._chunk(ack)
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

    def _check_survival(self, ways: dict[str, set[bytes]]) -> None:
        """Acknowledged chunks that are gone, and what may have taken them."""
        final = self._log.final
        for ack in self._log.acks:
            in_epoch = ack.tag in ways[ack.epoch]
            if in_epoch and final is not None and ack.epoch == final.epoch:
                continue
            forgotten = in_epoch and self._forgotten_after(ack)
            what = f"{self._chunk(ack)}, did not survive"
            if not (forgotten or self._taken(ack)):
                self._find(LOST, what)
            elif not any(at_s >= ack.at_s for at_s in self._log.noticed_s):
                self._find(LOST, f"{what}, and its client was not told")
            elif forgotten:
                self._verdict.forgotten += 1
            else:
                self._verdict.taken += 1

    def _chunk(self, ack: Ack) -> str:
        return f"chunk at {ack.sent.start}, acknowledged by {ack.worker} {self._at(ack.at_s)}"

    def _at(self, moment_s: float) -> str:
        return f"at {moment_s - self._began_s:.2f} s"

    def _taken(self, ack: Ack, until_s: float = float("inf")) -> bool:
        """Whether a fault before `until_s` may have taken it away."""
        return any(
            loss.since_s <= ack.at_s and ack.sent_s <= loss.until_s and loss.struck_s <= until_s
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
                    MIXED, f"{self._chunk(ack)}, in the epoch of a stream that was forgotten"
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
                f"{told.worker} answered {told.code} with position {told.position} "
                f"{self._at(told.at_s)}, after {last.position} was acknowledged by "
                f"{last.worker} {self._at(last.at_s)}",
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
