"""Result of the check of one run: its findings, and how much was checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.faults.records import Sent

LOST: Final = "lost"
DOUBLED: Final = "doubled"
MIXED: Final = "mixed"


@dataclass(frozen=True, slots=True)
class Finding:
    """A violation: lost, doubled or mixed."""

    kind: str
    stream: str
    what: str


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """A state that the stream may have been in: the chunks that lead to it.

    Attributes:
        before: the state before the last chunk; None at the beginning.
        outputs: int64 [T, H] of the last chunk, once they were computed.
    """

    tag: bytes
    position: int
    before: Node | None = None
    sent: Sent | None = None
    outputs: NDArray[np.int64] | None = None


@dataclass(slots=True)
class CheckResult:
    """Findings and counts.

    Attributes:
        rolled_back: acknowledged chunks that a fault took away; their clients noticed.
        removed: acknowledged chunks of streams that were deleted or expired.
    """

    findings: list[Finding] = field(default_factory=list)
    rolled_back: int = 0
    removed: int = 0
    checked_chunks: int = 0
    checked_events: int = 0
    bursts: int = 0

    def count(self, kind: str) -> int:
        """Findings of a kind."""
        return sum(finding.kind == kind for finding in self.findings)
