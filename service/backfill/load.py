"""Loads the states of a backfill into a store, which live consumers and clients then continue.

A stream is created, whole or not at all, and never overwritten unless it is asked for: one that
lives in the store is kept and listed. Epoch and tag of a state follow from the events that led to
it, so a stream that was loaded before is recognised, also after live events: loading can be
repeated at any time, and goes on after an error. Nothing is written before all files are verified.

    OUT/kept.csv        the streams that were not loaded, and why; missing if there are none
    OUT/offsets.json    of each source of events: up to where the states contain it (source marks)
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from service.backfill.load_progress import (
    KeptStream,
    LoadProgress,
    OffsetRange,
    Report,
    write_kept,
)
from service.backfill.load_versions import VersionLoader
from service.backfill.loader import Loader
from service.backfill.plan import BackfillError, Plan, read_plan, replacing
from service.backfill.record import is_as_computed
from service.core.errors import CarryError, OutcomeUnknown, StateDamaged, StoreUnavailable
from service.core.values import StreamHead, StreamKey, StreamState
from service.store.backup import BackupError, BackupReader
from service.store.base import CommitColumns, CommitResult, Committed, Store, decode_value
from service.store.codec import encode_state, pack_head
from service.store.source_mark import format_offset

ATTEMPTS: Final = 8
RETRY_S: Final = 0.2
"""Pause before a store that does not answer is called again, doubled with each attempt."""

EXISTS: Final = "the stream lives in the store"
DAMAGED: Final = "the stored state of the stream is damaged"

OFFSETS_FILE: Final = "offsets.json"


async def load_states(
    store: Store, out: Path, *, overwrite: bool = False, rate_per_s: float = 0.0, report: Report
) -> LoadProgress:
    """Write the states of a finished backfill into a store; may be repeated.

    Args:
        out: the output folder of the backfill.
        overwrite: whether streams that live, and do not come from these states, are overwritten;
            without effect on states for another version.
        rate_per_s: most streams a second; 0 for no limit.
        report: is called with the progress after each batch.

    Raises:
        BackfillError: the backfill is not complete, a file is damaged, or the store rejected a
            stream. What was written stays; the load can be repeated.
    """
    plan = read_plan(out)
    progress = LoadProgress()
    files = _verify_files(out, plan, progress)
    loader: StreamLoader | VersionLoader
    if plan.version:
        loader = VersionLoader(store, progress, report, rate_per_s, out)
    else:
        loader = StreamLoader(store, progress, report, rate_per_s, overwrite=overwrite)
    try:
        for bucket, file in enumerate(files):
            with file.open("rb") as opened:
                for block in BackupReader(opened):
                    await loader.load({key: stream.state for key, stream in block})
            if isinstance(loader, VersionLoader):
                loader.finish_bucket(bucket)
    except CarryError as error:
        raise BackfillError(
            f"{progress.done:,} of {progress.total:,} streams were processed, then the load "
            f"stopped: {error.detail}; run the command again to load the others"
        ) from error
    finally:
        write_kept(out, progress.kept)
    return progress


def _verify_files(out: Path, plan: Plan, progress: LoadProgress) -> list[Path]:
    """Read all files of states before any is written to a store; returns their paths.

    Raises:
        BackfillError
    """
    files = [out / "states" / f"bucket-{bucket:05d}.backup" for bucket in range(plan.buckets)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise BackfillError(
            f"the backfill in {out} is not complete: {len(missing):,} of {len(files):,} files of "
            f"states are missing, such as {missing[0].name}; `carry backfill` continues it"
        )
    fingerprint = bytes.fromhex(plan.fingerprint)
    for file in files:
        try:
            with file.open("rb") as opened:
                for block in BackupReader(opened):
                    for key, (state, _) in block:
                        if key.model != plan.model or state.fingerprint != fingerprint:
                            raise BackupError(f"stream {key.stream!r} is of another model")
                        if state.source is not None:
                            progress.note_mark(state.source)
                    progress.total += len(block)
            if not is_as_computed(out, file):
                raise BackupError("is not the file that the record of its bucket is of")
        except BackupError as error:
            raise BackfillError(
                f"{file}: {error}; nothing was loaded. Delete the file, and `carry backfill` "
                "computes it again"
            ) from error
    if progress.offsets:
        ranges = {
            source: OffsetRange(*map(format_offset, marks))
            for source, marks in sorted(progress.offsets.items())
        }
        with replacing(out / OFFSETS_FILE) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(ranges)) + b"\n")
    return files


class StreamLoader(Loader):
    """Creates streams in a store."""

    def __init__(
        self,
        store: Store,
        progress: LoadProgress,
        report: Report,
        rate_per_s: float,
        *,
        overwrite: bool,
    ):
        super().__init__(store, progress, report, rate_per_s)
        self._overwrite = overwrite

    async def load_batch(self, streams: dict[StreamKey, StreamState]) -> None:
        """Commit streams with a compare-and-set until each is written or kept."""
        expected = dict.fromkeys(streams, b"")
        pause_s = RETRY_S
        for attempt in range(1, ATTEMPTS + 1):
            failure: CarryError | None = None
            try:
                conflicting: list[StreamKey] = []
                for key, result in (await self._commit(streams, expected)).items():
                    if isinstance(result, Committed):
                        self._progress.loaded += 1
                        del streams[key]
                    elif isinstance(result, StoreUnavailable | OutcomeUnknown):
                        failure = result
                    elif isinstance(result, CarryError) and not isinstance(result, StateDamaged):
                        raise result
                    else:
                        conflicting.append(key)
                await self._resolve_conflicts(conflicting, streams, expected)
            except StoreUnavailable as error:
                failure = error
            if not streams:
                return
            if failure is not None:
                if attempt == ATTEMPTS:
                    raise failure
                await asyncio.sleep(pause_s)
                pause_s *= 2
        key = next(iter(streams))
        raise BackfillError(f"stream {key.stream!r} was not loaded: other writers change it")

    async def _commit(
        self, streams: Mapping[StreamKey, StreamState], expected: Mapping[StreamKey, bytes]
    ) -> dict[StreamKey, CommitResult]:
        keys = list(streams)
        columns = CommitColumns(
            keys,
            [expected[key] for key in keys],
            [encode_state(streams[key]) for key in keys],
            [b""] * len(keys),
        )
        return dict(zip(keys, await self._store.commit(columns), strict=True))

    async def _resolve_conflicts(
        self,
        keys: Sequence[StreamKey],
        streams: dict[StreamKey, StreamState],
        expected: dict[StreamKey, bytes],
    ) -> None:
        """Remove streams that are loaded or kept from `streams`, and set what the next commit of
        the others expects."""
        if not keys:
            return
        for key, value in zip(keys, await self._store.load(keys), strict=True):
            state, stored = streams[key], decode_value(key, value)
            if isinstance(stored, StreamState) and _is_loaded(stored.head, state.head):
                self._progress.loaded_before += 1
                del streams[key]
            elif isinstance(stored, StreamState) and not self._overwrite:
                self._keep(streams, key, EXISTS, stored.head)
            elif isinstance(stored, StateDamaged):
                if self._overwrite:
                    await self._store.delete(key, stored.head)
                else:
                    self._keep(streams, key, DAMAGED, None)
            elif isinstance(stored, CarryError):
                raise stored
            else:
                # nothing, a tombstone, or what is overwritten
                expected[key] = pack_head(stored.head if stored else None)

    def _keep(
        self,
        streams: dict[StreamKey, StreamState],
        key: StreamKey,
        reason: str,
        stored: StreamHead | None,
    ) -> None:
        position = streams.pop(key).head.position
        self._progress.kept.append(KeptStream(key.stream, reason, position, stored))


def _is_loaded(stored: StreamHead, head: StreamHead) -> bool:
    """Whether a stored stream is the one of this head, perhaps with later events."""
    return stored == head or (stored.epoch == head.epoch and stored.position > head.position)
