"""Long chunks in JSON, read a block at a time: others have their turn between.

Parsing ten thousand rows keeps the event loop for some twenty milliseconds. Here the rows are cut
where one ends, into blocks of a few kilobytes; the first of them stays in the body, which is read
as any other, and each further one is a list of rows of its own. Together they are the body's
rows, because a JSON list may be cut between its elements and nowhere else do these bytes come
together so: what does not parse that way is None, and is then read as a whole.
"""

from __future__ import annotations

import asyncio
import re
from typing import Final

from service.api.media import Media
from service.api.request_reader import RequestReader
from service.domain import Chunk, Precondition

LONG_BYTES: Final = 64 * 1024
"""Shorter bodies are read at once."""
BLOCK_BYTES: Final = 16 * 1024

_FIRST_ROW = re.compile(rb"\[[ \t\r\n]*(?=\[)")
_NEXT_ROW = re.compile(rb"[ \t\r\n]*,[ \t\r\n]*(?=\[)")


async def read_in_turns(
    reader: RequestReader, body: bytes, media: Media, stream: str, precondition: Precondition | None
) -> Chunk | None:
    """The one chunk of a long body; None where it has to be read as a whole."""
    if media is not Media.JSON or len(body) < LONG_BYTES:
        return None
    blocks = _cut(body)
    if blocks is None:
        return None
    first, *rest = blocks
    packed: list[bytes] = []
    for block in rest:
        await asyncio.sleep(0)
        rows = reader.plain_rows(block)
        if rows is None:
            return None
        packed.append(rows)
    await asyncio.sleep(0)
    return reader.plain_chunk(first, media, stream, precondition, more=packed)


def _cut(body: bytes) -> list[bytes] | None:
    """The body with its first block of rows alone, and every further block as a list of rows."""
    begin = _FIRST_ROW.search(body)
    if begin is None:
        return None
    blocks: list[bytes] = []
    start = begin.end()
    while True:
        end = body.find(b"]", start + BLOCK_BYTES) + 1
        following = _NEXT_ROW.match(body, end) if end else None
        if following is None:
            break
        blocks.append(body[start:end])
        start = following.end()
    if not blocks:
        return None
    # What is left holds the last rows and the end of the body.
    last = _LAST_ROW.search(body, start)
    if last is None:
        return None
    blocks.append(body[start : last.start() + 1])
    head, tail = body[: begin.end()], body[last.start() + 1 :]
    return [head + blocks[0] + tail, *(b"[%b]" % block for block in blocks[1:])]


_LAST_ROW = re.compile(rb"\][ \t\r\n]*\]")
