"""The topics of a run: their names, their model's events, and the consumers' configuration."""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np

from service.core.values import StreamKey
from service.store.keys import KeySpace
from tests.faults.network import FEATURES, MODEL, Rows, random_events

PARTITIONS: Final = 8
SOURCE, SINK, GROUP = "events", "outputs", "carry"
SPACE: Final = KeySpace("carry", PARTITIONS)
LEASE_S: Final = 1.0
CONFIG: Final = f"""\
model: {MODEL}
from: {SOURCE}
to: {SINK}
partitioned: true
lease_s: {LEASE_S}
"""
SETTINGS: Final = {
    "CARRY_PARTITIONS": str(PARTITIONS),
    "CARRY_RUNTIME": "onnxruntime",
    "CARRY_STORE_WAIT_S": "3",
    "CARRY_TIMEOUT_S": "3",
    "CARRY_DRAIN_S": "2",
}
_BLOCK: Final = 256


def topic(partition: int, kind: str = "in") -> str:
    """A topic of a partition: of events (`in`), of outputs (`out`) or of dead letters (`dead`)."""
    name = SINK if kind == "out" else SOURCE
    return f"{SPACE.partition_prefix(partition)}:{kind}:{name}"


def partition_of(stream: str) -> int:
    """The partition of a stream, whose topic has its events."""
    return SPACE.partition(StreamKey(MODEL, stream))


def has_positions(stream: str) -> bool:
    """Whether the events of a stream have positions: those of every other one."""
    return int(stream[1:]) % 2 == 0


def number_field(stream: str) -> str:
    """The field with an event's number in its stream: `position`, or one that no consumer reads."""
    return "position" if has_positions(stream) else "number"


class Events:
    """The events of all streams, which a seed determines: the same however often they are read."""

    def __init__(self, seed: int):
        self._block = cache(
            lambda stream, number: random_events(
                np.random.default_rng([seed, int(stream[1:]), number]), _BLOCK
            )
        )

    def read(self, stream: str, start: int, count: int) -> Rows:
        """The events of a stream from a position on, [count, F]."""
        numbers = range(start // _BLOCK, -(-(start + count) // _BLOCK))
        blocks = [self._block(stream, number) for number in numbers]
        return np.concatenate(blocks or [np.zeros((0, FEATURES), np.int8)])[start % _BLOCK :][
            :count
        ]
