"""Pages of a listing: complete and bounded, over a simulated hash table."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.store.redis.scan import MAX_STEPS, scan_page

# A server's table: per bucket its keys, and of each whether it matches.
TABLES = st.lists(st.lists(st.booleans(), max_size=4), min_size=1, max_size=400)


class Table:
    """Walks whole buckets until it has seen `count` keys, as a server does."""

    def __init__(self, buckets: list[list[bool]]):
        self._buckets = buckets
        self.steps = 0
        self.largest_count = 0
        self.names = {
            f"{b}-{k}" for b, keys in enumerate(buckets) for k, hit in enumerate(keys) if hit
        }
        self.largest_bucket = max(sum(keys) for keys in buckets)

    async def step(self, cursor: int, count: int) -> tuple[int, list[str]]:
        self.steps += 1
        self.largest_count = max(self.largest_count, count)
        found: list[str] = []
        seen = 0
        while seen < count and cursor < len(self._buckets):
            keys = self._buckets[cursor]
            found += [f"{cursor}-{k}" for k, hit in enumerate(keys) if hit]
            seen += max(1, len(keys))
            cursor += 1
        return (0 if cursor == len(self._buckets) else cursor), found


@given(TABLES, st.integers(1, 50), st.integers(1, 200))
async def test_a_listing_is_complete_and_its_pages_are_bounded(
    buckets: list[list[bool]], limit: int, max_count: int
) -> None:
    table = Table(buckets)
    listed: list[str] = []
    cursor: int | None = 0
    while cursor is not None:
        before, table.steps = cursor, 0
        names, cursor = await scan_page(table.step, cursor, limit, max_count)
        assert cursor is None or cursor > before, "a page must get on"
        assert 0 < table.steps <= MAX_STEPS
        assert len(names) <= max(limit, table.largest_bucket)
        listed += names
    assert sorted(listed) == sorted(table.names)
    assert table.largest_count <= max_count


async def test_a_scan_without_matches_grows_its_steps_and_is_bounded() -> None:
    table = Table([[False]] * 50_000)
    names, cursor = await scan_page(table.step, 0, 1, 100)
    assert names == []
    assert table.steps == MAX_STEPS
    assert cursor is not None
    assert cursor > 90 * 100
