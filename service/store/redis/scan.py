"""Pages of a listing out of steps of a scan, with every step and every page bounded.

A scan step returns every match of the part it walked over; what does not fit the page must
not be dropped. So a step that gave too much is taken again in smaller, and the page ends
before it. A cluster's nodes are walked one after another; where streams may have moved between
them meanwhile, from the beginning, so that none is missed.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

MAX_STEPS: Final = 100
_PLACE: Final = re.compile(r"(?:([0-9a-f]{12})\.([0-9]{1,4})\.)?([0-9]{1,20})")

Step = Callable[[int, int], Awaitable[tuple[int, list[str]]]]
"""(cursor, keys to look at) -> (next cursor, 0 at the end; names that match)."""


class Place(NamedTuple):
    """Where a listing goes on.

    Attributes:
        layout: the servers' layout it belongs to; empty on a single server.
        server: which of them.
        cursor: the server's own, 0 at its beginning.
    """

    layout: str = ""
    server: int = 0
    cursor: int = 0

    @classmethod
    def parse(cls, text: str) -> Place:
        """A place out of its words.

        Raises:
            ValueError: they are none.
        """
        found = _PLACE.fullmatch(text)
        if found is None or int(found[3]) >= 2**64:
            raise ValueError(text)
        return cls(found[1] or "", int(found[2] or 0), int(found[3]))

    def __str__(self) -> str:
        return f"{self.layout}.{self.server}.{self.cursor}" if self.layout else str(self.cursor)

    def within(self, layout: str, servers: int) -> Place:
        """Itself in a layout of so many servers, or the beginning where it is of another."""
        if self.layout == layout and self.server < servers:
            return self
        return Place(layout)


async def scan_page(
    step: Step, cursor: int, limit: int, max_count: int
) -> tuple[list[str], int | None]:
    """One page, in at most MAX_STEPS steps.

    Args:
        cursor: where to go on, 0 for the beginning.
        limit: names on a page, at least 1; more only where a single bucket holds more.
        max_count: keys to look at per step, at most.

    Returns:
        The names, each once, and where the next page begins, None at the end.
    """
    names: dict[str, None] = {}
    count = min(limit, max_count)
    for _ in range(MAX_STEPS):
        room = limit - len(names)
        following, found = await step(cursor, count)
        if len(found) > room:
            if count > 1:
                count = min(room, count // 2)
                continue
            if names:
                return list(names), cursor
        names.update(dict.fromkeys(found))
        if following == 0:
            return list(names), None
        cursor = following
        if len(names) >= limit:
            break
        # Where nothing matches, look at more at once; where much does, at what fits.
        count = min(max_count, 2 * count if not found else max(1, limit - len(names)))
    return list(names), cursor
