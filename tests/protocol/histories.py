"""Histories of streams: what a commit keeps, and the states that follow from what is kept.

Pure functions over `History`. Only the oracle of `invariants` computes from all events of a stream;
everything here sees what the store has.
"""

from collections.abc import Iterable
from typing import NamedTuple

from tests.protocol.state import NO_HISTORY, NOTHING, Entry, History, Keys, Scenario, Version

Computed = tuple[float, int | None]
"""The float of a state, and the position since which it is computed; None if it is exact."""


class HistoryRead(NamedTuple):
    """What a model reads of a stream; `StoredHistory` of the service."""

    record: Version
    is_valid: bool = False
    entries: tuple[Entry, ...] = ()
    snapshot: Version = NOTHING
    version_state: Version = NOTHING


def is_valid(keys: Keys) -> bool:
    """Whether the history is that of the stored state."""
    return keys.state.stream is not None and keys.history.head == keys.state.compared


def advance(artifact: int, value: float, events: Iterable[int]) -> list[float]:
    """The outputs of a model: octal digits, with the sign of the model."""
    sign = -1 if artifact else 1
    return [value := value * 8 + sign * event for event in events]


def add_entry(scenario: Scenario, keys: Keys, new: Version, entry: Entry) -> History:
    """`history.lua`: the history after a commit that maintains it and replaces `keys`."""
    record = keys.state
    if record.stream is None or record.head.epoch != new.head.epoch:
        snapshots = add_snapshot(scenario, (), new, 0)
        return History(new.compared, (entry,), snapshots)
    history = keys.history if is_valid(keys) else NO_HISTORY
    entries, snapshots = (*history.entries, entry), history.snapshots
    if len(entries) == 1 and not snapshots:
        snapshots = (record,)
    while new.head.position - entries[0].stop >= scenario.max_events:
        entries = entries[1:]
    newest = snapshots[-1].head.position if snapshots else 0
    snapshots = add_snapshot(scenario, snapshots, new, newest)
    return History(new.compared, entries, snapshots, keep_state(history.states, record, new))


def keep_state(states: tuple[Version, ...], record: Version, new: Version) -> tuple[Version, ...]:
    """The version states after a commit, also if another model than the record's made it."""
    if record.artifact == new.artifact:
        return states
    others = [each for each in states if each.artifact not in (record.artifact, new.artifact)]
    return (*others, record)


def add_snapshot(
    scenario: Scenario, snapshots: tuple[Version, ...], new: Version, newest: int
) -> tuple[Version, ...]:
    """The snapshots after a commit: one more if it is far enough beyond the newest. Of too many,
    the older one is dropped that is missed least."""
    most = scenario.max_snapshots
    near = most - most // 4
    if new.head.position - newest < max(1, scenario.max_events // near):
        return snapshots
    kept = [*snapshots, new]
    positions = [each.head.position for each in kept]
    while len(kept) > most:
        older = range(1, len(kept) - near)
        gaps = {
            at: (positions[at + 1] - positions[at - 1]) / (positions[-1] - positions[at])
            for at in older
        }
        dropped = min(gaps, key=lambda at: (gaps[at], at)) if gaps else 0
        del kept[dropped], positions[dropped]
    return tuple(kept)


def is_on_branch(keys: Keys, state: Version) -> bool:
    """Whether the stream had the head of a version state, as far as its history reaches."""
    head = state.head
    entries = keys.history.entries if is_valid(keys) else ()
    return head == keys.state.head or any(
        (entry.start, entry.tag) == (head.position, head.tag) for entry in entries
    )


def is_in_epoch(keys: Keys, state: Version) -> bool:
    """Whether a version state is of the epoch of the stream."""
    return is_valid(keys) and keys.state.head.epoch == state.head.epoch


def put_state(keys: Keys, new: Version) -> History | None:
    """`version_commit.lua`: the history with another version state, None if it is outdated."""
    own = [each for each in keys.history.states if each.artifact == new.artifact]
    others = [each for each in keys.history.states if each.artifact != new.artifact]
    is_newer = all(
        each.head.epoch != new.head.epoch or each.head.position < new.head.position for each in own
    )
    if keys.state.artifact == new.artifact or not is_newer:
        return None
    return keys.history._replace(states=(*others, new))


def replace_history(stored: History, history: History, new: Version) -> History:
    """`history_write.lua`: the history of a state that no chunk leads to. Of a stored one only
    snapshots are left, up to the position of the state."""
    position, (_, entries, snapshots, _) = new.head.position, history
    kept = tuple(each for each in stored.snapshots if each.head.position <= position)
    snapshots = (*kept, *snapshots)
    if not snapshots and not entries:
        snapshots = (new,)
    return History(new.compared, entries, snapshots)


def cut(entries: tuple[Entry, ...], position: int) -> tuple[Entry, ...]:
    """The entries up to a position."""
    return tuple(each for each in entries if each.stop <= position)


def read(keys: Keys, artifact: int, position: int | None = None) -> HistoryRead:
    """`history_read.lua`: a stream with its history, as a model reads it."""
    record, (_, entries, snapshots, states) = keys.state, keys.history
    if not is_valid(keys):
        return HistoryRead(record)
    before = [
        each
        for each in snapshots
        if each.artifact == artifact and position is not None and each.head.position <= position
    ]
    own = [
        each
        for each in states
        if each.artifact == artifact and each.head.epoch == record.head.epoch
    ]
    return HistoryRead(
        record, True, entries, before[-1] if before else NOTHING, own[0] if own else NOTHING
    )


def state_of(stored: HistoryRead, artifact: int) -> Computed:
    """The state of a model at the head of a stream: the record, a version state, one that the
    events lead to, or the initial state."""
    bases, head, state = [stored.record], stored.record.head, stored.version_state
    if state and (state.head == head or state.head.position < head.position):
        bases.append(state)
    computed = compute_state(stored, artifact, bases, head.position)
    assert computed is not None
    return computed


def rewound_state(stored: HistoryRead, artifact: int, position: int) -> Computed | None:
    """The state of a model at an earlier position; None if it is not available."""
    bases = [each for each in (stored.record, stored.snapshot) if each]
    return compute_state(stored, artifact, bases, position)


def compute_state(
    stored: HistoryRead, artifact: int, bases: Iterable[Version], position: int
) -> Computed | None:
    """The state at a position: from the nearest base at or before it, else from the first event
    that is kept; None if these events do not reach it."""
    entries = stored.entries
    start = entries[0].start if entries else stored.record.head.position
    events = [event for entry in entries for event in entry.events]
    nearest = None
    for base in bases:
        is_before = base.artifact == artifact and base.head.position <= position
        is_reached = base.head.position == position or base.head.position >= start
        is_nearer = nearest is None or nearest.head.position < base.head.position
        if is_before and is_reached and is_nearer:
            nearest = base
    if nearest is not None:
        rest = events[nearest.head.position - start : position - start]
        value = float(nearest.value)
        return (advance(artifact, value, rest) or [value])[-1], nearest.since
    if start > position:
        return None
    value = (advance(artifact, 0.0, events[: position - start]) or [0.0])[-1]
    return value, start or None
