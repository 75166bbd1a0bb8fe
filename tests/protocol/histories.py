"""Histories of streams: what a commit keeps, and the states that follow from what is kept.

Pure functions over `History`. From where a model computes a state is decided by the service
(`pipeline.rewarm`, `pipeline.rewind`). Only the oracle of `invariants` computes from all events of
a stream; everything here sees what the store has.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from models.spec.state import State
from service.core.values import Feed, Steps, StreamKey, StreamState, Tombstone
from service.pipeline.history_run import Advanced, HistoryRun
from service.pipeline.rewarm import end_rewarming, find_rewarm_start
from service.pipeline.rewind import Past
from service.store.codec import encode_state, encode_tombstone
from service.store.history import StoredHistory
from service.store.history_codec import HistoryCodec
from tests.protocol.state import (
    FINGERPRINTS,
    NO_HISTORY,
    NOTHING,
    Entry,
    History,
    Keys,
    Scenario,
    Version,
)

HISTORY_CODEC = HistoryCodec(None, 1)

Computed = tuple[float, int | None]
"""The float of a state, and the position since which it is computed; None if it is exact."""


class HistoryRead(NamedTuple):
    """What a model reads of a stream; `StoredHistory` of the service."""

    record: Version
    is_valid: bool = False
    entries: tuple[Entry, ...] = ()
    snapshot: Version = NOTHING
    positions: tuple[int, ...] = ()
    version_state: Version = NOTHING

    def encode(self) -> StoredHistory:
        """What the service reads."""
        stored = self.record.stored
        encode = encode_tombstone if isinstance(stored, Tombstone) else encode_state
        if not self.is_valid:
            return StoredHistory(stored and encode(stored))
        return StoredHistory(
            encode(stored),
            True,
            [encode_entry(entry) for entry in self.entries],
            encode_state(self.snapshot.stored) if self.snapshot else None,
            list(self.positions),
            encode_state(self.version_state.stored) if self.version_state else None,
        )


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
    written = [each for each in snapshots if each.artifact == artifact]
    positions = tuple(each.head.position for each in written)
    before = [each for each in written if position is not None and each.head.position <= position]
    own = [
        each
        for each in states
        if each.artifact == artifact and each.head.epoch == record.head.epoch
    ]
    snapshot, version_state = before[-1] if before else NOTHING, own[0] if own else NOTHING
    return HistoryRead(record, True, entries, snapshot, positions, version_state)


def state_of(stored: HistoryRead, artifact: int) -> Computed:
    """The state of a model at the head of a stream, as the service finds it."""
    served: Any = ServedModel(artifact)
    key = StreamKey("", "")
    start = find_rewarm_start(served, key, stored.record.stream, stored.encode())
    run = start.run
    value = (_advance_over(artifact, run) or [float(run.state.floats[0])])[-1]
    after = end_rewarming(served, start, Advanced(state(value), was_reset=False))
    assert isinstance(after, StreamState)
    return value, after.since


def rewound_state(stored: HistoryRead, artifact: int, position: int) -> Computed | None:
    """The state of a model at an earlier position; None if it is not available."""
    entries, record = stored.entries, stored.record
    start, states = entries[0].start if entries else record.head.position, [*stored.positions]
    if record.artifact == artifact:
        states.append(record.head.position)
    if entries and entries[0].starts:
        states.append(start)
    base = Past(sorted(states), start, record.head.position).find_base(position)
    if base is None:
        return None
    source = NOTHING  # the initial state
    if record.artifact == artifact and base == record.head.position:
        source = record
    elif base in stored.positions:
        source = stored.snapshot
    value = float(source.value) if source else 0.0
    decoded = [HISTORY_CODEC.decode(encode_entry(entry)) for entry in entries]
    run = HistoryRun(state(value), base, decoded, position)
    return (_advance_over(artifact, run) or [value])[-1], source.since


def _advance_over(artifact: int, run: HistoryRun) -> list[float]:
    """What a model gives over recent events."""
    events = [
        int(row[0])
        for entry in run.entries
        for at, row in enumerate(entry.steps.rows, entry.start)
        if run.position <= at < run.until
    ]
    return advance(artifact, float(run.state.floats[0]), events)


def state(value: float) -> State:
    """A state with one float."""
    return State(np.array([value], np.float32), np.zeros(0, np.int64))


def encode_entry(entry: Entry) -> bytes:
    """An entry as it is stored, without its tag."""
    rows = np.array(entry.events, np.float32)[:, np.newaxis]
    steps = Steps(Feed.INPUTS, len(rows), rows=rows)
    return HISTORY_CODEC.encode(entry.start, steps, starts=entry.starts)


class ServedModel:
    """What the service asks of a version of a model; it never forgets a start."""

    blocks, chunk_limit, initial, history_codec = None, None, state(0.0), HISTORY_CODEC
    history = True

    def __init__(self, artifact: int):
        self.fingerprint = FINGERPRINTS[artifact]

    def is_compatible(self, stored: StreamState) -> bool:
        """Whether the version wrote a state."""
        return stored.fingerprint == self.fingerprint

    def find_since(self, since: int | None, position: int, *, was_reset: bool) -> int | None:
        """The position since which a state is computed; None if it is exact."""
        return None if was_reset else since
