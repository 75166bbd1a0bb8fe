"""What was loaded into a store, what was not and why, and where consumers start."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from service.backfill.plan import replacing
from service.core.values import SourceMark, StreamHead
from service.store.source_mark import KAFKA, format_offset

KEPT_FILE: Final = "kept.csv"


class KeptStream(NamedTuple):
    """A stream that was not loaded.

    Attributes:
        position: of the state that was not loaded.
        stored: the head that the store has; None if it is not known.
    """

    stream: str
    reason: str
    position: int
    stored: StreamHead | None


class OffsetRange(msgspec.Struct):
    """The lowest and the highest of the offsets up to which states contain a source."""

    lowest: str
    highest: str


@dataclass(slots=True)
class LoadProgress:
    """What was loaded so far.

    Attributes:
        total: streams in the files.
        loaded: streams that were written.
        loaded_before: streams that the store had from an earlier load, perhaps with later events.
        kept: streams that were not loaded.
        offsets: by source, the lowest and the highest of the states' source marks.
    """

    total: int = 0
    loaded: int = 0
    loaded_before: int = 0
    kept: list[KeptStream] = field(default_factory=list)
    offsets: dict[str, tuple[SourceMark, SourceMark]] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Streams that were processed."""
        return self.loaded + self.loaded_before + len(self.kept)

    def note_mark(self, mark: SourceMark) -> None:
        """Include the source mark of a state."""
        lowest, highest = self.offsets.get(mark.source, (mark, mark))
        self.offsets[mark.source] = min(lowest, mark), max(highest, mark)


Report = Callable[[LoadProgress], None]


def describe_starts(progress: LoadProgress) -> dict[str, str]:
    """By topic, the `start` of new consumers: no event behind it is in all states of its topic, and
    what is in some of them is skipped."""
    starts: dict[str, str] = {}
    partitions: dict[str, dict[int, int]] = {}
    for source, (lowest, _) in sorted(progress.offsets.items()):
        if source.startswith(KAFKA):
            topic, _, partition = source.removeprefix(KAFKA).rpartition(":")
            partitions.setdefault(topic, {})[int(partition)] = lowest.offset + 1
        else:
            starts[source] = format_offset(lowest)
    for topic, offsets in partitions.items():
        numbers = ", ".join(f"{each}: {offset}" for each, offset in sorted(offsets.items()))
        starts[topic] = f"{{{numbers}}}"
    return starts


def write_kept(out: Path, kept: Sequence[KeptStream]) -> None:
    """List the streams that were not loaded."""
    if not kept:
        (out / KEPT_FILE).unlink(missing_ok=True)
        return
    with replacing(out / KEPT_FILE) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["stream", "reason", "position", "stored_position", "stored_epoch"])
        for each in kept:
            head = each.stored
            stored = (head.position, head.epoch.hex()) if head else ("", "")
            writer.writerow([each.stream, each.reason, each.position, *stored])
