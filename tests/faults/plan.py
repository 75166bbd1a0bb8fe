"""Which faults come, in which order: plain data, made from a seed before a run begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import cycle, islice
from typing import Final

import numpy as np

from tests.faults.traffic import STAGES


class Kind(StrEnum):
    """What breaks."""

    WORKER_KILL = "worker killed"
    WORKER_PAUSE = "worker stopped and continued"
    WORKER_TERM = "worker terminated"
    STORE_KILL = "store killed"
    STORE_PAUSE = "store stopped and continued"
    STORE_FULL = "store's memory full"
    ROLLBACK = "store rolled back"
    CUT_REQUEST = "requests cut"
    CUT_REPLY = "replies cut"
    CUT_COMMIT = "commits cut"
    CUT_ANSWER = "commits' answers cut"
    HOLD_WRITE = "writes held, delivered late"
    OWNER_KILL = "embedded store's service killed"
    OWNER_TERM = "embedded store's service terminated"
    FAILOVER = "failover"
    LOSSY_FAILOVER = "lossy failover"


EVERYWHERE: Final = (
    Kind.WORKER_PAUSE,
    Kind.WORKER_TERM,
    Kind.STORE_KILL,
    Kind.STORE_PAUSE,
    Kind.STORE_FULL,
    Kind.CUT_REQUEST,
    Kind.CUT_REPLY,
    Kind.CUT_COMMIT,
    Kind.CUT_ANSWER,
    Kind.HOLD_WRITE,
)
KINDS: Final[dict[str, tuple[Kind, ...]]] = {
    "valkey": (*EVERYWHERE, Kind.ROLLBACK, Kind.OWNER_KILL, Kind.OWNER_TERM),
    "redis": (*EVERYWHERE, Kind.ROLLBACK),
    "cluster": (*EVERYWHERE, Kind.FAILOVER, Kind.LOSSY_FAILOVER),
}
"""What can occur on a store, kills of workers apart."""

KILLED_SHARE: Final = 4
"""One fault of this many kills a worker, the stages in turn."""

_PAUSES_S: Final = (0.2, 0.5, 0.5, 1.0, 1.5, 3.5)
"""Short ones, ones longer than a worker waits for an answer, one longer than the store's whole
patience."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        seconds: length of a pause, age of the restored files, or longest delay of held writes.
        stage: where a chunk of the worker that is killed is to be.
        gap_s: pause before it.
        pick: chooses whom it meets.
    """

    kind: Kind
    seconds: float
    gap_s: float
    pick: int
    stage: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.stage}" if self.stage else str(self.kind)


def make_plan(store: str, count: int, random: np.random.Generator, longest_s: float) -> list[Fault]:
    """`count` faults for a store: kinds and stages as evenly as the count allows, shuffled."""
    kills = max(len(STAGES), count // KILLED_SHARE)
    others = max(0, count - kills)
    wanted: list[tuple[Kind, str]] = [
        (Kind.WORKER_KILL, stage) for stage in islice(cycle(STAGES), kills)
    ]
    wanted += [(kind, "") for kind in islice(cycle(KINDS[store]), others)]
    random.shuffle(wanted)
    return [_fault(Kind(kind), str(stage), random, longest_s) for kind, stage in wanted[:count]]


def more_kills(stages: list[str], random: np.random.Generator) -> Iterator[Fault]:
    """Further kills, for stages that were hit too rarely."""
    for stage in stages:
        yield _fault(Kind.WORKER_KILL, stage, random, 0.0)


def _fault(kind: Kind, stage: str, random: np.random.Generator, longest_s: float) -> Fault:
    return Fault(
        kind,
        min(longest_s, float(random.choice(_PAUSES_S))),
        float(random.uniform(0.05, 0.4)),
        int(random.integers(1 << 30)),
        stage,
    )
