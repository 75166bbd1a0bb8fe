"""What a stream's replies say, against all of its events: nothing lost, doubled or mixed, each
output of the version that the reply names, from the state that it announces.

The versions of the network are a gain apart (`network.write`), and nothing fades: the state of a
version that has seen the events since a position is the gain times what these events give from the
zero state, and no other events give it. So an output tells exactly which events its state has seen.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.faults.checker import DOUBLED, LOST, MIXED, Finding
from tests.faults.history import FIRST_TAG, Chunk, Head, Reply, next_tag
from tests.faults.network import ZERO, compute, turn

EXACT, COLD, FORGOTTEN = (
    "replies from an exact state",
    "replies from a state that announces what it has seen",
    "replies from a state whose start counts as forgotten",
)
_HEAD_CODES = frozenset({"already_applied", "position_behind"})
"""Rejections of a retry whose stored reply is gone."""


@dataclass(slots=True, eq=False)
class Stream:
    """What one stream was sent, and its replies, in order."""

    name: str
    chunks: list[Chunk] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    final: Head | None = None

    @property
    def position(self) -> int:
        """Where the next chunk begins."""
        return sum(len(chunk.rows) for chunk in self.chunks)


def check(
    stream: Stream, gains: Mapping[str, int], burn_in: int, seen: Counter[str]
) -> list[Finding]:
    """The violations in one stream.

    Args:
        gains: of the versions.
        burn_in: events after which a version counts a start as forgotten.
        seen: counts what was checked.
    """
    return [
        (kind, f"{stream.name}: {what}")
        for kind, what in _StreamCheck(stream, gains, burn_in, seen).violations()
    ]


class _StreamCheck:
    """Finds the violations in one stream."""

    def __init__(self, stream: Stream, gains: Mapping[str, int], burn_in: int, seen: Counter[str]):
        self._stream, self._gains, self._burn_in, self._seen = stream, gains, burn_in, seen
        rows = [chunk.rows for chunk in stream.chunks]
        self._rows = np.concatenate(rows) if rows else np.zeros((0, 0), np.int8)
        # the state [H] of gain 1 before each event, and after the last
        self._states = np.concatenate([ZERO[np.newaxis], compute(ZERO, self._rows)])
        self._tags, tag = {0: FIRST_TAG}, FIRST_TAG
        for chunk in stream.chunks:
            tag = next_tag(tag, chunk.start, chunk.digest)
            self._tags[chunk.start + len(chunk.rows)] = tag
        # positions by what lacks in the later states of a network that started there
        self._starts: defaultdict[bytes, list[int]] = defaultdict(list)
        for position, state in enumerate(self._states):
            self._starts[turn(state, -position).tobytes()].append(position)

    def violations(self) -> Iterator[Finding]:
        """Check each reply, then that nothing followed the last one."""
        epochs = set()
        for reply in self._stream.replies:
            epochs.add(reply.epoch)
            yield from self._check_head(reply)
            if not reply.code:
                yield from self._check_outputs(reply)
        if len(epochs) > 1:
            yield LOST, f"has the epochs {epochs}"
        final, position = self._stream.final, len(self._rows)
        if final is not None and (final.position, final.tag) != (position, self._tags[position]):
            yield LOST, f"ends at {final.position}, expected {position}"

    def _check_head(self, reply: Reply) -> Iterator[Finding]:
        """Each chunk is applied once, in order: its tag follows."""
        stop = reply.chunk.start + len(reply.chunk.rows)
        what = f"the chunk at {reply.chunk.start} is answered {reply.code} by {reply.worker}"
        if reply.code and reply.code not in _HEAD_CODES:
            yield LOST, f"{what} with position {reply.position}"
        elif (reply.position, reply.tag) != (stop, self._tags[stop]):
            kind = DOUBLED if reply.position > stop else LOST
            yield kind, f"{what} with position {reply.position}, expected {stop}, or another tag"

    def _check_outputs(self, reply: Reply) -> Iterator[Finding]:
        """The outputs are those of the version that the reply names, or of any if it names none."""
        what = f"the chunk at {reply.chunk.start}, answered by {reply.version} of {reply.worker}"
        gains = self._gains
        if reply.version is not None:
            gains = {name: gain for name, gain in gains.items() if name == reply.version}
        reasons = [f"{what}, which does not exist"]
        for gain in gains.values():
            found, reason = self._find_state(reply, gain)
            if reason is None:
                self._seen[found] += 1
                return
            reasons.append(f"{what}: {reason}")
        yield MIXED, reasons[-1]

    def _find_state(self, reply: Reply, gain: int) -> tuple[str, str | None]:
        """The kind of state that a version answered from, and what contradicts it."""
        start, warm = reply.chunk.start, reply.warm
        if warm is not None:
            events, of = warm
            if of != self._burn_in or not 0 <= events < min(of, start):
                return COLD, f"it is warm {events}/{of}"
            is_true = self._is_since(reply, gain, start - events)
            return COLD, None if is_true else f"the outputs are not those since {start - events}"
        if self._is_since(reply, gain, 0):
            return EXACT, None
        since = self._find_start(reply, gain)
        if since is None:
            return FORGOTTEN, "no events lead to its outputs"
        is_true = start - since >= self._burn_in
        return (
            FORGOTTEN,
            None if is_true else f"they are those since {since}, which it does not say",
        )

    def _is_since(self, reply: Reply, gain: int, since: int) -> bool:
        """Whether the outputs are those of the events since a position."""
        start = reply.chunk.start
        before = self._state_since(since, start)
        return np.array_equal(reply.outputs, gain * compute(before, reply.chunk.rows))

    def _state_since(self, since: int, at: int) -> NDArray[np.int64]:
        """The state at a position of a network that has seen the events since another one."""
        return self._states[at] - turn(self._states[since], at - since)

    def _find_start(self, reply: Reply, gain: int) -> int | None:
        """Since which position the outputs are computed."""
        stop = reply.chunk.start + len(reply.chunk.rows)
        state = np.rint(reply.outputs[-1] / gain).astype(np.int64)
        starts = self._starts.get(turn(self._states[stop] - state, -stop).tobytes(), ())
        for since in starts:
            if since <= reply.chunk.start and self._is_since(reply, gain, since):
                return since
        return None
