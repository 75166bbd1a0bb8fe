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

from service.core.values import StreamKey
from service.store.keys import KeySpace
from tests.faults.network import FEATURES, MODEL, OUTPUT, UNITS, Rows, random_events

PARTITIONS: Final = 8
SOURCE, SINK, GROUP = "events", "outputs", "carry"
SPACE: Final = KeySpace("carry", PARTITIONS)
FIELDS: Final = tuple(f"x{number}" for number in range(FEATURES))
OUTPUT_COLUMNS: Final = tuple(f"{OUTPUT}[{number}]" for number in range(UNITS))
KINDS: Final = "ttphhhtwtthphhtn"
"""Of the streams, in turn."""

LEASE_S: Final = 1.0
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

_BLOCK: Final = 64
Entry = tuple[bytes, dict[bytes, bytes]]
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
        count = PARTITIONS if partitioned else 1
        self.sources = [self._name("in", SOURCE, partition) for partition in range(count)]
        self.sinks = [self._name("out", SINK, partition) for partition in range(count)]
        self.dead = [self._name("dead", SOURCE, partition) for partition in range(count)]

    def source(self, stream: str) -> str:
        """The topic with the events of a stream."""
        is_one = not self.partitioned
        return self.sources[0 if is_one else SPACE.partition(StreamKey(MODEL, stream))]

    def _name(self, kind: str, name: str, partition: int) -> str:
        if self.partitioned:
            return f"{SPACE.partition_prefix(partition)}:{kind}:{name}"
        return f"{name}:dead" if kind == "dead" else name


class Events:
    """The events of all streams, which a seed determines: the same however often they are read."""

    def __init__(self, seed: int):
        self._seed = seed
        self._blocks: dict[tuple[str, int], Rows] = {}

    def read(self, stream: str, start: int, count: int) -> Rows:
        """The events of a stream from a position on, [count, F]."""
        numbers = range(start // _BLOCK, -(-(start + count) // _BLOCK))
        blocks = [self._block(stream, number) for number in numbers]
        return np.concatenate(blocks or [np.zeros((0, FEATURES), np.int8)])[start % _BLOCK :][
            :count
        ]

    def _block(self, stream: str, number: int) -> Rows:
        block = self._blocks.get((stream, number))
        if block is None:
            random = np.random.default_rng([self._seed, int(stream[1:]), number])
            block = self._blocks[stream, number] = random_events(random, _BLOCK)
        return block


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
