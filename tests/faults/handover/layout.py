"""The streams of a run, their events and topics, and the history that is recorded of them.

    t  events from a topic, each entry another one: only its source mark says which are in the state
    p  events from a topic, with positions
    h  a client of the HTTP API, which continues at the position behind its history
    w  a client that began before the history was loaded: its stream is kept as it lives
    n  events from a topic, without a history

The model forgets nothing and computes in whole numbers (`tests.faults.network`): one event that is
missing, doubled or another stream's changes every later output.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl

from tests.faults.network import FEATURES, MODEL, OUTPUT, UNITS
from tests.faults.topics.layout import (
    LEASE_S,
    PARTITIONS,
    SINK,
    SOURCE,
    Events,
    partition_of,
    topic,
)

FIELDS: Final = tuple(f"x{number}" for number in range(FEATURES))
OUTPUT_COLUMNS: Final = tuple(f"{OUTPUT}[{number}]" for number in range(UNITS))
KINDS: Final = "ttphhhtwtthphhtn"
"""Of the streams, in turn."""

SETTINGS: Final = {
    "CARRY_PARTITIONS": str(PARTITIONS),
    "CARRY_RUNTIME": "onnxruntime",
    "CARRY_DRAIN_S": "2",
}
BACKFILL: Final = (
    *("--stream", "stream", "--order-by", "number", "--offset", "entry"),
    *("--source-topic", SOURCE, "--workers", "1", "--quiet"),
)
"""Options of `carry backfill` for the recorded events."""

FILES: Final = 5
REPEATED_SHARE: Final = 0.02
"""Rows of the history that are recorded twice, with the same offset."""

RecordedEvent = tuple[str, int, str | None]
"""Stream, number of the event in it, and the id of its entry if it came from a topic."""


def make_names(count: int) -> list[str]:
    """The names of so many streams; the first letter says of which kind one is."""
    return [f"{KINDS[number % len(KINDS)]}{number}" for number in range(count)]


def has_topic(stream: str) -> bool:
    """Whether the events of a stream come from a topic."""
    return stream[0] in "tpn"


def config_text(start: str, *, partitioned: bool) -> str:
    """The configuration of the consumers, which read the topics from a start on."""
    config = {"model": MODEL, "from": SOURCE, "to": SINK, "lease_s": LEASE_S, "create": True}
    return json.dumps({**config, "start": start, "partitioned": partitioned})


class Topics:
    """The names of the topics of a run.

    Args:
        partitioned: whether each partition of the store has a topic.
    """

    def __init__(self, *, partitioned: bool):
        self.partitioned = partitioned
        self.sources, self.sinks, self.dead = [SOURCE], [SINK], [f"{SOURCE}:dead"]
        if partitioned:
            self.sources, self.sinks, self.dead = (
                [topic(partition, kind) for partition in range(PARTITIONS)]
                for kind in ("in", "out", "dead")
            )

    def source(self, stream: str) -> str:
        """The topic with the events of a stream."""
        return self.sources[partition_of(stream) if self.partitioned else 0]


def event_of(row: Sequence[int]) -> dict[str, int]:
    """An event, as requests and entries have it."""
    return dict(zip(FIELDS, map(int, row), strict=True))


def write_history(folder: Path, rows: Sequence[RecordedEvent], events: Events, seed: int) -> None:
    """Write recorded events into files, in any order, and those of topics sometimes twice."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    repeated = random.random(len(rows)) < REPEATED_SHARE
    order = random.permutation(
        [
            at
            for at, row in enumerate(rows)
            for _ in range(1 + (repeated[at] and row[2] is not None))
        ]
    )
    chosen = [rows[at] for at in order]
    counts = Counter(stream for stream, *_ in rows)
    firsts = dict(zip(counts, accumulate(counts.values(), initial=0), strict=False))
    values = np.concatenate([events.read(stream, 0, count) for stream, count in counts.items()])
    values = values[[firsts[stream] + number for stream, number, _ in chosen]]
    columns: dict[str, Any] = {
        "stream": [row[0] for row in chosen],
        "number": [row[1] for row in chosen],
        "entry": pl.Series([row[2] for row in chosen], dtype=pl.String),
    }
    table = pl.DataFrame(columns | dict(zip(FIELDS, values.T.astype(np.int64), strict=True)))
    size = -(-table.height // FILES)
    for number, part in enumerate(table.iter_slices(size)):
        part.write_parquet(folder / f"part-{number}.parquet")
