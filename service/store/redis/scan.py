"""Lists streams in pages by SCAN; every page and every scan step is bounded.

A SCAN call returns every match of the buckets it visited, and what does not fit the page must not
be dropped. So a step that returned too many names is repeated with a smaller COUNT, and the page
ends before a step that does not fit. The nodes of a cluster are scanned one after the other; if
streams may have moved between them meanwhile, the listing restarts, so that none is missed.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Hashable
from typing import Final, NamedTuple, TypeVar

from service.core.errors import InvalidInput
from service.core.values import StreamKey, StreamPage
from service.store.codec import TOMBSTONE_PREFIX
from service.store.keys import KeySpace
from service.store.redis.pipelined_connection import RedisServer
from service.store.redis.router import Router

MAX_STEPS: Final = 100
SCAN_COUNT: Final = 1000
"""Largest COUNT of a SCAN call."""

_CURSOR: Final = re.compile(r"(?:([0-9a-f]{12})\.([0-9]{1,4})\.)?([0-9]{1,20})")

Match = TypeVar("Match", bound=Hashable)
Step = Callable[[int, int], Awaitable[tuple[int, list[Match]]]]
"""(cursor, COUNT) -> (next cursor, 0 at the end; what matched)."""


class ScanCursor(NamedTuple):
    """Position of a listing, across servers.

    Attributes:
        layout: version of the layout it belongs to; empty for a single server.
        server: index of the server in that layout.
        cursor: SCAN cursor of that server, 0 at its beginning.
    """

    layout: str = ""
    server: int = 0
    cursor: int = 0

    @classmethod
    def parse(cls, text: str) -> ScanCursor:
        """Parse a cursor that `str` wrote.

        Raises:
            ValueError: the string is not a cursor.
        """
        match = _CURSOR.fullmatch(text)
        if match is None or int(match[3]) >= 2**64:
            raise ValueError(text)
        return cls(match[1] or "", int(match[2] or 0), int(match[3]))

    def __str__(self) -> str:
        return f"{self.layout}.{self.server}.{self.cursor}" if self.layout else str(self.cursor)

    def or_restart(self, layout: str, server_count: int) -> ScanCursor:
        """The cursor itself, or the beginning if it belongs to another layout."""
        if self.layout == layout and self.server < server_count:
            return self
        return ScanCursor(layout)


async def list_streams(
    router: Router, model: str | None, prefix: str, cursor: str | None, limit: int
) -> StreamPage:
    """Read one page of streams (`StateStore.streams`).

    Raises:
        InvalidInput: the cursor is invalid.
        StoreUnavailable, StoreRefused: the store as a whole.
    """
    try:
        start = ScanCursor() if cursor is None else ScanCursor.parse(cursor)
    except ValueError as error:
        raise InvalidInput(
            f"cursor: expected the `cursor` of the previous page, or none, got {cursor!r}",
            at="cursor",
        ) from error
    keys, layout = router.settings.keys, await router.layout()
    start = start.or_restart(layout.version, len(layout.servers))
    server = layout.servers[start.server]

    step = scan_step(server, keys, model, prefix)
    streams, server_cursor = await scan_page(step, start.cursor, limit, SCAN_COUNT)
    streams = await drop_tombstones(server, keys, streams)
    following: ScanCursor | None = None
    if server_cursor is not None:
        following = start._replace(cursor=server_cursor)
    elif start.server + 1 < len(layout.servers):
        following = ScanCursor(layout.version, start.server + 1)
    elif (current := (await router.layout()).version) != layout.version:
        following = ScanCursor(current)
    return StreamPage(tuple(streams), None if following is None else str(following))


def scan_step(
    server: RedisServer, keys: KeySpace, model: str | None = None, prefix: str = ""
) -> Step[StreamKey]:
    """Make the step that reads the streams of a model, or of all, with a name prefix."""
    pattern = keys.pattern(model, prefix)

    async def step(cursor: int, count: int) -> tuple[int, list[StreamKey]]:
        reply = await server.read("SCAN", cursor, "MATCH", pattern, "COUNT", count)
        streams = map(keys.parse, (name.decode("utf-8", "replace") for name in reply[1]))
        return int(reply[0]), [
            key for key in streams if key is not None and key.stream.startswith(prefix)
        ]

    return step


async def scan_page(
    step: Step[Match], cursor: int, limit: int, max_count: int
) -> tuple[list[Match], int | None]:
    """Read one page of a single server, in at most MAX_STEPS steps.

    Args:
        cursor: where the page starts, 0 for the beginning.
        limit: matches on a page, at least 1; more only if a single bucket holds more.
        max_count: largest COUNT of a step.

    Returns:
        The matches, each once, and the cursor of the next page, None at the end.
    """
    found: dict[Match, None] = {}
    count = min(limit, max_count)
    for _ in range(MAX_STEPS):
        room = limit - len(found)
        following, matches = await step(cursor, count)
        if len(matches) > room:
            if count > 1:
                count = min(room, count // 2)
                continue
            if found:
                return list(found), cursor
        found.update(dict.fromkeys(matches))
        if following == 0:
            return list(found), None
        cursor = following
        if len(found) >= limit:
            break
        # Grow the step if nothing matched; otherwise visit about as many keys as still fit.
        count = min(max_count, 2 * count if not matches else max(1, limit - len(found)))
    return list(found), cursor


async def drop_tombstones(
    server: RedisServer, keys: KeySpace, streams: list[StreamKey]
) -> list[StreamKey]:
    """The streams whose keys still exist and are not tombstones."""
    if not streams:
        return streams
    last = len(TOMBSTONE_PREFIX) - 1
    commands = [("GETRANGE", keys.state(stream), 0, last) for stream in streams]
    prefixes = await server.read_many(commands)
    # A slot that is migrating answers with an error: its streams are listed.
    return [
        stream
        for stream, prefix in zip(streams, prefixes, strict=True)
        if prefix not in (b"", TOMBSTONE_PREFIX)
    ]
