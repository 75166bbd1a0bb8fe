"""The order of the tests: each worker's share begins with long tests, and `alone` runs last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.order import LONG, ordered

pytestmark = pytest.mark.harness


@dataclass(frozen=True)
class Item:
    path: Path
    number: int
    marker: str = ""

    def get_closest_marker(self, name: str) -> bool | None:
        return True if name == self.marker else None


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_each_share_begins_with_whole_files_of_long_tests(workers: int) -> None:
    items = [
        Item(Path(folder, f"test_{file}.py"), number, "alone" if (file, number) == (1, 0) else "")
        for folder in (LONG[0], "core", LONG[1], "store")
        for file in range(5)
        for number in range(6)
    ]
    result = ordered(items, workers)
    assert sorted(map(str, result)) == sorted(map(str, items))
    assert [item.marker for item in result[-4:]] == ["alone"] * 4
    starts = [len(items) * number // workers for number in range(workers)]
    assert {result[start].path.parent.name for start in starts} <= set(LONG[:2])
    for path in {item.path for item in items}:
        places = [
            place for place, item in enumerate(result) if item.path == path and not item.marker
        ]
        if path.parent.name in LONG:
            assert places == list(range(places[0], places[-1] + 1))
