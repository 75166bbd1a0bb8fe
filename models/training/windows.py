"""Arranges streams for truncated back-propagation through time with carried states.

A stream's events are split into *segments* of at most `segment_steps`, a segment into *windows*
of nearly equal length, at most `window_steps`. Segments of about the same length run side by
side as one *group*: its windows follow one another, each from the state the last one left, and
gradients stop between them. A segment starts from the state in which the segment before it
last ended; a stream's first segment starts from the zero state. So every event is
seen once per epoch, from its stream's own past, and streams of any lengths share full batches.

Pure NumPy. Invariant: within an epoch each step is in exactly one window, and a window's rows
never mix two streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

LENGTHS_PER_WINDOW = 4
"""Padded window lengths are multiples of a quarter window: few shapes, little padding."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive steps of one stream.

    Attributes:
        start: first row, an index into the rows of all streams.
        stop: one past the last row.
        before: index of the segment that precedes it in its stream, or None for the first.
    """

    start: int
    stop: int
    before: int | None

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Window:
    """One window of a group, padded to T steps and B slots of a batch.

    Attributes:
        index: int64 [B, T], the row that each step reads; padding repeats row 0.
        lengths: int32 [B], valid steps of each slot; 0 if a slot is empty or has ended.
    """

    index: NDArray[np.int64]
    lengths: NDArray[np.int32]


def segments_of(spans: Sequence[tuple[int, int]], segment_steps: int) -> list[Segment]:
    """Split each stream's rows [start, stop) into segments; empty streams have none."""
    segments: list[Segment] = []
    for start, stop in spans:
        before: int | None = None
        for begin in range(start, stop, segment_steps):
            segments.append(Segment(begin, min(begin + segment_steps, stop), before))
            before = len(segments) - 1
    return segments


def groups_of(segments: Sequence[Segment], batch_size: int) -> list[list[int]]:
    """Indices of segments, `batch_size` to a group, those of about the same length together."""
    order = sorted(range(len(segments)), key=lambda i: (-segments[i].steps, i))
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def windows_of(group: Sequence[Segment], batch_size: int, window_steps: int) -> Iterator[Window]:
    """The windows of one group, in order.

    Args:
        group: at most `batch_size` segments; slot i carries segment i.
        batch_size: B.
        window_steps: most steps of a window; the longest segment's are nearly equal.
    """
    longest = max(segment.steps for segment in group)
    count = ceil(longest / window_steps)
    grain = max(1, window_steps // LENGTHS_PER_WINDOW)
    steps = min(window_steps, ceil(ceil(longest / count) / grain) * grain)
    offsets = np.arange(steps, dtype=np.int64)
    starts = np.zeros(batch_size, np.int64)
    stops = np.zeros(batch_size, np.int64)
    starts[: len(group)] = [segment.start for segment in group]
    stops[: len(group)] = [segment.stop for segment in group]
    for begin in range(0, longest, steps):
        first = starts + begin
        lengths = np.clip(stops - first, 0, steps).astype(np.int32)
        index = np.where(offsets < lengths[:, None], first[:, None] + offsets, 0)
        yield Window(index, lengths)
