"""The latest outputs of one watched stream, buffered once for all its watches.

A watch reads them at its own pace, by sequence numbers. Neither a watch that waits for its client
nor their number costs anything when an output arrives, and the memory is bounded by the stream: the
oldest outputs are dropped for new ones, and a watch that has not read them notices by the
positions.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice
from typing import Any, Final, NamedTuple, Protocol

from service.pipeline.turns import Turns
from service.store.capabilities import PublishedOutput

MAX_BUFFERED: Final = 256
"""Outputs that are buffered for one stream."""

MAX_BUFFERED_BYTES: Final = 2**20

MAX_AT_ONCE_BYTES: Final = 16 * 1024
"""Outputs that a watch reads in one turn, unless a single one has more."""


class Reader(Protocol):
    """What the buffer needs of a watch."""

    def resynchronize(self) -> None:
        """Outputs may have been lost: read the stream."""


class BufferedOutput(NamedTuple):
    """An output and what transports made of it, so that each encodes it once for all watches.

    Attributes:
        encoded: by the options of the transport.
    """

    output: PublishedOutput
    encoded: dict[Any, bytes]


class OutputBuffer:
    """Buffer of one stream, a `Receiver`.

    Attributes:
        watches: the watches that read it.
        end: sequence number of the next output.
    """

    def __init__(self, turns: Turns):
        self.watches: set[Reader] = set()
        self._turns = turns
        self._buffered: deque[BufferedOutput] = deque()
        self._bytes = 0
        self.end = 0
        # ordered, so that the watch that has waited longest is first
        self._idle: dict[asyncio.Future[None], None] = {}

    def receive(self, output: PublishedOutput) -> None:
        """Buffer an output, in place of the oldest ones if there is no room."""
        self._buffered.append(BufferedOutput(output, {}))
        self._bytes += _size(output)
        self.end += 1
        while len(self._buffered) > MAX_BUFFERED or self._bytes > MAX_BUFFERED_BYTES:
            self._bytes -= _size(self._buffered.popleft().output)
        for turn in self._idle:
            self._turns.request(turn)
        self._idle.clear()

    def resynchronize(self) -> None:
        """Outputs may have been lost: the watches read the stream."""
        for watch in self.watches:
            watch.resynchronize()

    def read(self, start: int) -> tuple[list[BufferedOutput], int]:
        """The outputs from a sequence number on, as many as are read at once, and the sequence
        number after them; those that were dropped are skipped."""
        first = max(start, self.end - len(self._buffered))
        outputs: list[BufferedOutput] = []
        size = 0
        for each in islice(self._buffered, first - self.end + len(self._buffered), None):
            size += _size(each.output)
            if outputs and size > MAX_AT_ONCE_BYTES:
                break
            outputs.append(each)
        return outputs, first + len(outputs)

    async def wait(self, start: int, turn: asyncio.Future[None]) -> None:
        """Wait for a turn, which is requested once there is an output from `start` on."""
        if start < self.end:
            self._turns.request(turn)
        else:
            self._idle[turn] = None
        try:
            await turn
        finally:
            self._idle.pop(turn, None)


def _size(output: PublishedOutput) -> int:
    return 0 if output.reply is None else output.reply.outputs.nbytes
