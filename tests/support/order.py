"""Orders the tests so that several workers end at about the same time.

pytest-xdist gives each worker an equal share of consecutive tests; one that has finished its share
steals the end of another's. So each share begins with tests that take seconds, and ends with those
that take milliseconds. A test marked `alone`, for which the other workers pause, is the very last:
then they do not pause in the middle of a long test.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import pytest

LONG = ("bench", "faults", "load", "networks", "system", "training")
"""Folders whose tests take seconds: they start services, or build and train networks."""


def ordered(items: Sequence[pytest.Item], workers: int) -> list[pytest.Item]:
    """The same tests; those of a file stay together, as they share its fixtures."""
    kinds: dict[str, list[pytest.Item]] = {"alone": [], "long": [], "short": []}
    for item in items:
        is_alone = item.get_closest_marker("alone") is not None
        is_long = item.path.parent.name in LONG
        kinds["alone" if is_alone else "long" if is_long else "short"].append(item)
    alone, long, short = kinds.values()
    shares: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for number, (_, tests) in enumerate(groupby(long, lambda item: item.path)):
        shares[number % workers] += tests
    result: list[pytest.Item] = []
    for number, share in enumerate(shares, 1):
        end = len(items) * number // workers
        filling = max(0, end - len(result) - len(share))
        result += [*share, *short[:filling]]
        del short[:filling]
    return [*result, *short, *alone]
