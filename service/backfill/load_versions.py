"""Loads the states of a backfill that are for another version of the model of live streams.

Each is stored beside the state of its live stream, with the head that this had when the heads were
read. Once the version answers, it continues from there over the recent events that the store keeps
of the stream: exact, if these reach back to that head.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from service.backfill.heads import load_heads
from service.backfill.load_progress import KeptStream, LoadProgress, Report
from service.backfill.loader import Loader
from service.core.errors import CarryError
from service.core.values import StreamHead, StreamKey, StreamState, Tombstone
from service.store.base import Store, decode_value
from service.store.codec import encode_state
from service.store.layout import StateHeader

READS_AT_ONCE: Final = 16
ENDS_EARLIER: Final = "the recorded events end before the position that the stream had"
GONE: Final = "the stream does not live any more"
STARTED_OVER: Final = "the stream is in another epoch"
NO_HISTORY: Final = "the store keeps no recent events of the stream: `history` in the specification"
OUT_OF_REACH: Final = "the recent events of the stream do not reach back to the position"


class VersionLoader(Loader):
    """Writes states for another version beside those of live streams.

    Args:
        out: the output folder, with the heads.
    """

    def __init__(
        self, store: Store, progress: LoadProgress, report: Report, rate_per_s: float, out: Path
    ):
        super().__init__(store, progress, report, rate_per_s)
        self._out = out
        self._seen: set[str] = set()

    async def load_batch(self, streams: dict[StreamKey, StreamState]) -> None:
        """Write the states of streams; each is loaded or kept when it returns."""
        keys = list(streams)
        self._seen.update(key.stream for key in keys)
        states = [encode_state(streams[key]) for key in keys]
        written = await self._store.histories.commit_versions(keys, states)
        rest = [key for key, is_written in zip(keys, written, strict=True) if not is_written]
        self._progress.loaded += len(keys) - len(rest)
        for first in range(0, len(rest), READS_AT_ONCE):
            part = rest[first : first + READS_AT_ONCE]
            await asyncio.gather(*[self._explain(key, streams[key]) for key in part])

    def finish_bucket(self, bucket: int) -> None:
        """List the live streams of a bucket that have no state: their histories end earlier."""
        for name, head in load_heads(self._out, bucket).items():
            if name not in self._seen:
                self._progress.total += 1
                self._keep(name, ENDS_EARLIER, head.position, head)
        self._seen.clear()

    async def _explain(self, key: StreamKey, state: StreamState) -> None:
        """Record why a state was not written."""
        head = state.head
        history = await self._store.histories.read(key, state.fingerprint)
        stored = decode_value(key, history.record)
        if isinstance(stored, CarryError):
            raise stored
        if stored is None or isinstance(stored, Tombstone):
            self._keep(key.stream, GONE, head.position, None)
            return
        own = history.version_state and StateHeader.decode(history.version_state).position
        reason = OUT_OF_REACH
        if stored.head.epoch != head.epoch:
            reason = STARTED_OVER
        elif stored.fingerprint == state.fingerprint or (own or 0) >= head.position:
            # this version computes the stream already, or has a state that is as far
            self._progress.loaded_before += 1
            return
        elif not history.is_valid:
            reason = NO_HISTORY
        self._keep(key.stream, reason, head.position, stored.head)

    def _keep(self, stream: str, reason: str, position: int, stored: StreamHead | None) -> None:
        self._progress.kept.append(KeptStream(stream, reason, position, stored))
