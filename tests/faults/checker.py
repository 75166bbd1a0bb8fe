"""Checker: was a chunk lost, applied twice, or mixed up? By what the clients saw alone.

Tags are hash chains, so the chunks that were sent determine the possible histories: each chunk that
starts at the position of a known state leads to one further tag. The history of an epoch is the
chain to the stream's final tag, or, where the stream was removed before, to the last tag that was
acknowledged in it. Then

    mixed      an acknowledged tag that no chain of sent chunks gives; outputs, a position or an
               epoch that are not those of the chunks on the chain to that tag; a removed
               stream's epoch that comes back
    doubled    outputs as if one chunk of the chain had been applied twice
    lost       an acknowledged chunk outside the history of its epoch, unless a fault that may
               take it away came between and its client noticed; an epoch that ended otherwise
               than by such a fault or because the stream was removed; outputs as if one chunk
               of the chain were missing; two appends acknowledged for one place; a rejection that
               denies what was acknowledged before

The outputs of every acknowledged chunk, also of those that were rolled back, are compared bit by
bit with whole-number arithmetic (`network.Reference`): what an undisturbed service computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.faults.appends import check_burst
from tests.faults.network import Reference
from tests.faults.records import (
    FIRST_TAG,
    Ack,
    Head,
    History,
    Rejection,
    Sent,
    StreamLog,
    next_tag,
)
from tests.faults.result import DOUBLED, LOST, MIXED, CheckResult, Finding, Node

_MOST_STATES: Final = 200_000
_LOOK_BACK: Final = 400
"""Chunks that are tried as the missing or doubled one."""


def check(history: History) -> CheckResult:
    """Check all streams and all bursts of appends of a run."""
    result = CheckResult()
    reference = Reference()
    for log in history.streams:
        _StreamCheck(log, history, reference, result).run()
    for burst in history.bursts:
        check_burst(burst, history.losses, reference, result)
    return result


class _StreamCheck:
    def __init__(self, log: StreamLog, history: History, reference: Reference, result: CheckResult):
        self._log = log
        self._losses = history.losses
        self._began_s = history.began_s
        self._reference = reference
        self._result = result
        self._nodes: dict[bytes, Node] = {}

    def run(self) -> None:
        self._find_states()
        chains = self._histories()
        for ack in self._log.acks:
            self._check_ack(ack)
        self._check_survival(chains)
        self._check_removed()
        self._check_refusals()

    def _find(self, kind: str, what: str) -> None:
        self._result.findings.append(Finding(kind, self._log.name, what))

    def _find_states(self) -> None:
        """Every state that was seen; where the end cannot be reached by them, every one that
        can have been."""
        log = self._log
        seen = {ack.tag for ack in log.acks} | {rejection.tag for rejection in log.rejections}
        if log.final is not None:
            seen.add(log.final.tag)
        self._nodes = _states(log.sents, seen)
        wanted = {ack.tag for ack in log.acks}
        if log.final is not None:
            wanted.add(log.final.tag)
        if not wanted <= self._nodes.keys():
            self._nodes = _states(log.sents, None)

    def _histories(self) -> dict[str, set[bytes]]:
        """The tags on the chain to the last state of each epoch."""
        final = self._log.final
        ends = {ack.epoch: ack.tag for ack in sorted(self._log.acks, key=lambda ack: ack.at_s)}
        if final is not None:
            ends[final.epoch] = final.tag
            node = self._nodes.get(final.tag)
            if node is None:
                self._find(MIXED, f"is at {_place(final)}, which no chain of sent chunks gives")
            elif node.position != final.position:
                self._find(MIXED, f"is at {_place(final)}, its chunks end at {node.position}")
        found = {}
        for epoch, tag in ends.items():
            chain = list(_chain(self._nodes[tag])) if tag in self._nodes else []
            found[epoch] = {node.tag for node in chain}
        return found

    def _check_ack(self, ack: Ack) -> None:
        """Tag, position and outputs against the chunks that lead to the tag."""
        result = self._result
        result.checked_chunks += 1
        result.checked_events += len(ack.sent.rows)
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

    def _check_survival(self, chains: dict[str, set[bytes]]) -> None:
        """Check that every missing acknowledged chunk was rolled back or removed."""
        final = self._log.final
        for ack in self._log.acks:
            in_epoch = ack.tag in chains[ack.epoch]
            if in_epoch and final is not None and ack.epoch == final.epoch:
                continue
            removed = in_epoch and self._was_removed_after(ack)
            what = f"{self._chunk(ack)}, did not survive"
            if not (removed or self._may_be_rolled_back(ack)):
                self._find(LOST, what)
            elif not any(at_s >= ack.at_s for at_s in self._log.noticed_s):
                self._find(LOST, f"{what}, and its client did not notice")
            elif removed:
                self._result.removed += 1
            else:
                self._result.rolled_back += 1

    def _chunk(self, ack: Ack) -> str:
        return f"chunk at {ack.sent.start}, acknowledged by {ack.worker} {self._at(ack.at_s)}"

    def _at(self, moment_s: float) -> str:
        return f"at {moment_s - self._began_s:.2f} s"

    def _may_be_rolled_back(self, ack: Ack, until_s: float = float("inf")) -> bool:
        """Whether a fault before `until_s` may have rolled it back."""
        return any(
            loss.since_s <= ack.at_s and ack.sent_s <= loss.until_s and loss.struck_s <= until_s
            for loss in self._losses
        )

    def _was_removed_after(self, ack: Ack, until_s: float = float("inf")) -> bool:
        return any(
            ack.sent_s <= span.until_s and span.from_s <= until_s for span in self._log.removed
        )

    def _check_removed(self) -> None:
        """The epoch of a removed stream does not come back, unless the store rolled back."""
        ended: dict[str, float] = {}
        for span in self._log.removed:
            for ack in self._log.acks if span.sure else ():
                if ack.at_s <= span.from_s:
                    ended[ack.epoch] = span.until_s
        for ack in self._log.acks:
            ended_s = ended.get(ack.epoch)
            if ended_s is None or ack.sent_s <= ended_s or ack.replayed:
                continue
            if not any(loss.since_s <= ended_s <= loss.done_s for loss in self._losses):
                self._find(MIXED, f"{self._chunk(ack)}, in the epoch of a stream that was removed")

    def _check_refusals(self) -> None:
        """No refusal denies what was acknowledged before it was asked for."""
        acks = sorted(self._log.acks, key=lambda ack: ack.at_s)
        for rejection in self._log.rejections:
            last = _last_before(acks, rejection)
            if last is None or (
                rejection.epoch == last.epoch and rejection.position >= last.position
            ):
                continue
            if self._may_be_rolled_back(last, rejection.at_s) or self._was_removed_after(
                last, rejection.at_s
            ):
                continue
            self._find(
                LOST,
                f"{rejection.worker} answered {rejection.code} with position {rejection.position} "
                f"{self._at(rejection.at_s)}, after {last.position} was acknowledged by "
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


def _chain(node: Node) -> Iterable[Node]:
    """From the first chunk to this one."""
    chain = []
    at: Node | None = node
    while at is not None and at.sent is not None:
        chain.append(at)
        at = at.before
    return reversed(chain)


def _outputs(node: Node, reference: Reference) -> NDArray[np.int64]:
    """Outputs of the last chunk of the chain; each chunk is computed once."""
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
    chain = list(_chain(node))
    for each in chain[-_LOOK_BACK:]:
        state, later = each.outputs[-1], node.position - each.position
        twice = reference.outputs(state, each.sent.rows)[-1]
        if (difference == reference.turned(twice - state, later)).all():
            return DOUBLED, f"are as if the chunk at {each.sent.start} were applied twice"
        first = each.before.outputs is None
        without = reference.zero() if first else each.before.outputs[-1]
        if (difference == reference.turned(without - state, later)).all():
            return LOST, f"are as if the chunk at {each.sent.start} were missing"
    return MIXED, f"differ by up to {np.abs(difference).max()}"


def _last_before(acks: list[Ack], rejection: Rejection) -> Ack | None:
    """The last answer that came before a refusal was asked for."""
    found = None
    for ack in acks:
        if ack.at_s >= rejection.sent_s:
            break
        found = ack
    return found


def _place(head: Head) -> str:
    return f"position {head.position} of epoch {head.epoch}"
