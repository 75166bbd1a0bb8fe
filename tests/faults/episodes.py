"""Judges appends: each that was acknowledged has a place of its own, after the ones before it."""

from __future__ import annotations

from itertools import pairwise

from tests.faults.network import Reference
from tests.faults.records import Episode, Loss
from tests.faults.verdict import DOUBLED, LOST, MIXED, Finding, Verdict


def check_episode(
    episode: Episode, losses: list[Loss], reference: Reference, verdict: Verdict
) -> None:
    """Each acknowledged append has a place of its own, after the ones before it.

    Where chunks got no reply, the stream may be longer than the acknowledged ones. An episode
    during which a fault may have taken some away is not judged.
    """
    span = episode.span
    if any(loss.since_s <= span.until_s and span.from_s <= loss.done_s for loss in losses):
        return
    verdict.episodes += 1
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
    if standing < applied or (standing > applied and not episode.unknown):
        kind = LOST if standing < applied else DOUBLED
        find(kind, f"stands at {standing} after {applied} events were acknowledged")
    state, at = reference.zero(), 0
    for ack, (start, end) in zip(acks, places, strict=True):
        if start != at:
            return
        outputs = reference.outputs(state, ack.rows)
        if (ack.outputs != outputs).any():
            find(MIXED, f"the append at {start} has outputs that do not follow")
            return
        state, at = outputs[-1], end
