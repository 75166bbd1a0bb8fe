"""Interface of the channel by which workers share the outputs of watched streams.

Nobody has to listen, so it is cheap and lossy: delivery is at most once. A receiver notices what it
missed by the positions, and reads the stream to be sure.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

from service.core.values import StoredReply, StreamKey


class Output(NamedTuple):
    """What happened to a watched stream.

    Attributes:
        start: position of the chunk's first event.
        reply: head and outputs after the chunk; None if the stream was deleted.
    """

    key: StreamKey
    start: int
    reply: StoredReply | None


class Receiver(Protocol):
    """Receives the outputs of one stream."""

    def receive(self, output: Output) -> None:
        """Take an output; must not block."""

    def resynchronize(self) -> None:
        """Outputs may have been lost: read the stream."""


class OutputChannel(Protocol):
    """Shares the outputs of watched streams among the workers of a store."""

    @property
    def watched(self) -> Collection[StreamKey]:
        """The streams that any worker watches now; usually none."""

    async def start(self) -> None:
        """Connect, in the background; once, after the store is started."""

    async def close(self) -> None:
        """Release connections; once."""

    def publish(self, key: StreamKey, start: int, reply: bytes) -> None:
        """Send an output to the workers that watch a stream; never blocks, may drop it.

        Args:
            start, reply: as those of `Output`; the reply is encoded, and empty if there is none.
        """

    async def subscribe(self, key: StreamKey, receiver: Receiver) -> None:
        """Receive what any worker commits from now on; end it with `unsubscribe`, in any case.

        Raises:
            StoreUnavailable: the workers could not be told in time.
            StoreRefused: the store does not permit it.
        """

    def unsubscribe(self, key: StreamKey, receiver: Receiver) -> None:
        """Stop receiving."""
