"""Options of one run; most of them are options of the command too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.faults.transports import TIMEOUT_S, TRANSPORTS

if TYPE_CHECKING:
    from tests.faults.faults import Fault


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of one run.

    Attributes:
        kills_per_stage: further kills follow until each stage was hit this often.
        plan: the faults; None to make them from the seed.
        removals: share of chunks before which the stream is deleted or expires.
        short_lived: one stream of this many is deleted and created all the time; 0: none.
        append_pause_s: mean pause between two bursts of an appender.
        longest_s: no pause is longer.
    """

    store: str
    seed: int
    events: int = 500_000
    faults: int = 110
    streams: int = 48
    transports: tuple[str, ...] = tuple(TRANSPORTS)
    plant: str | None = None
    strict: bool = False
    verbose: bool = False
    kills_per_stage: int = 0
    plan: tuple[Fault, ...] | None = None
    removals: float = 0.003
    short_lived: int = 7
    appenders: int = 2
    append_pause_s: float = 0.3
    longest_s: float = 10.0
    timeout_s: float = TIMEOUT_S
