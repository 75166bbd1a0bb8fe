"""Options of one run; most of them are options of the command too."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from tests.faults.planted_bugs.sitecustomize import CODE, SCRIPTS
from tests.faults.transports import TIMEOUT_S, TRANSPORTS

if TYPE_CHECKING:
    from tests.faults.faults import Fault


def _option(default: Any, text: str, **how: Any) -> Any:
    """An option of the command, with what argparse needs to know."""
    return field(default=default, metadata={"help": text, **how})


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
    seed: int | None = _option(None, "seed of the faults; a new one", type=int)
    events: int = _option(500_000, "acknowledged events, at least (500000)", type=int)
    faults: int = _option(110, "faults, spread over the events (110)", type=int)
    streams: int = _option(48, "streams (48)", type=int)
    transports: tuple[str, ...] = _option(
        tuple(TRANSPORTS), "how chunks are sent (all)", nargs="+", choices=tuple(TRANSPORTS)
    )
    plant: str | None = _option(
        None, "plant a bug in the workers", choices=sorted({*CODE, *SCRIPTS})
    )
    strict: bool = _option(
        False, "cluster: acknowledge when the replicas have it", action="store_true"
    )
    verbose: bool = _option(False, "print each fault before it is injected", action="store_true")
    kills_per_stage: int = 0
    plan: tuple[Fault, ...] | None = None
    removals: float = 0.003
    short_lived: int = 7
    appenders: int = 2
    append_pause_s: float = 0.3
    longest_s: float = 10.0
    timeout_s: float = TIMEOUT_S

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options of the command."""
        for each in fields(cls):
            if each.metadata:
                parser.add_argument(f"--{each.name}", default=each.default, **each.metadata)
