"""Long chunks in JSON, read a block at a time, so that the event loop runs in between.

Parsing ten thousand rows keeps the event loop for some twenty milliseconds. Here the rows are cut
where one ends, into blocks of a few kilobytes; the first of them stays in the body, which is read
as any other, and each further one is a list of rows of its own. Together they are the body's
rows, because a JSON list may be cut between its elements and nowhere else do these bytes come
together so. A body that does not parse that way gives None, and is then read by `LongReader`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from service.core.values import Chunk, Precondition
from service.transports.http.bodies.request_reader import RequestReader
from service.transports.http.long_bodies.admission import Checkpoint
from service.transports.http.media import Media

LONG_BYTES: Final = 64 * 1024
"""Shorter bodies are read at once."""
BLOCK_BYTES: Final = 16 * 1024

_FIRST_ROW = re.compile(rb"\[[ \t\r\n]*(?=\[)")
_NEXT_ROW = re.compile(rb"[ \t\r\n]*,[ \t\r\n]*(?=\[)")


async def read_in_turns(
    reader: RequestReader,
    body: bytes,
    media: Media,
    stream: str,
    precondition: Precondition | None,
    checkpoint: Checkpoint,
) -> Chunk | None:
    """The chunk of a long body; None if `LongReader` has to read it.

    Raises:
        DeadlineExceeded
    """
    if media is not Media.JSON or len(body) < LONG_BYTES:
        return None
    begin = _FIRST_ROW.search(body, 0, _NEAR_BEGIN)
    last = _LAST_ROW.search(body, max(0, len(body) - BLOCK_BYTES))
    if begin is None or last is None:
        return None
    first: bytes | None = None
    packed: list[bytes] = []
    most = 4 * reader.served.input_features * reader.limits.max_chunk_steps
    for block in _blocks(body, begin.end(), last.start() + 1):
        if first is None:
            first = block
            continue
        await checkpoint()
        rows = reader.plain_rows(b"[%b]" % block)
        if rows is None:
            return None
        packed.append(rows)
        most -= len(rows)
        if most < 0:
            return None
    await checkpoint()
    if first is None or not packed:
        return None
    whole = b"".join((body[: begin.end()], first, body[last.start() + 1 :]))
    return reader.plain_chunk(whole, media, stream, precondition, more=packed)


def _blocks(body: bytes, start: int, stop: int) -> Iterator[bytes]:
    """Split the rows between two offsets into blocks; ends early where they are not rows."""
    while True:
        end = body.find(b"]", start + BLOCK_BYTES, stop) + 1
        following = _NEXT_ROW.match(body, end, stop) if end else None
        if following is None or end - start > 4 * BLOCK_BYTES:
            break
        yield body[start:end]
        start = following.end()
    yield body[start:stop]


_NEAR_BEGIN = 4096
"""The rows begin within this many bytes."""
_LAST_ROW = re.compile(rb"\][ \t\r\n]*\]")
