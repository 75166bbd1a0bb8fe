"""Token buckets of access keys in the store, which all processes share and lease tokens from.

A bucket is exact: every token that a process reports as spent is deducted, below zero if need be,
so that the rate holds on average whatever the processes spent in the meantime. A lease reserves
tokens for one process, so that together the processes seldom overdraw the bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from service.core.errors import CarryError


class LeaseRequest(NamedTuple):
    """A process reports what it spent, and needs another lease.

    Attributes:
        bucket: the name of the bucket.
        burst: the most tokens that it has.
        spent: tokens that the process spent since its last lease began.
    """

    bucket: str
    rate_per_s: float
    burst: float
    spent: float


class Lease(NamedTuple):
    """Tokens for one process, until its next lease, or for a second.

    Attributes:
        free: tokens that no process has leased; less than 0 if too many were spent.
        processes: how many use the bucket, this one included.
    """

    tokens: float
    free: float
    processes: int


class RateLeases(Protocol):
    """Leases tokens to this process."""

    async def lease(
        self, requests: Sequence[LeaseRequest], deadline_s: float = math.inf
    ) -> list[Lease | CarryError]:
        """Renew leases, in one round trip; after an error, tokens may or may not be counted."""
