"""The heads of live streams, for the states of another version of their model.

They are read once, before the events are computed: each stream's history is cut at the position
that the live stream had, and its state gets the head of there. From it the version continues over
the recent events that the store keeps of the stream.

    OUT/heads/part-NNNNN.parquet    bucket, stream, epoch, tag, position
    OUT/heads/complete              all parts are there
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl

from service.backfill.plan import COMPLETE, BackfillError, Plan, replacing
from service.core.errors import CarryError
from service.core.values import StreamHead
from service.store.base import Store
from service.store.layout import StateHeader

PAGE_STREAMS: Final = 1000
PART_STREAMS: Final = 1_000_000
_TYPES: Final = {
    "bucket": pl.UInt32,
    "stream": pl.String,
    "epoch": pl.Binary,
    "tag": pl.Binary,
    "position": pl.Int64,
}


def has_heads(out: Path) -> bool:
    """Whether the heads were read."""
    return (out / "heads" / COMPLETE).exists()


async def read_heads(store: Store, plan: Plan, out: Path) -> None:
    """Read the heads of the model's streams that another version computes, unless it was done.

    Raises:
        StoreUnavailable, StoreRefused: none is used; the call can be repeated.
        BackfillError: no stream lives that another version computes.
    """
    folder = out / "heads"
    if has_heads(out):
        return
    folder.mkdir(exist_ok=True)
    rows: list[tuple[Any, ...]] = []
    cursor, part, live = None, 0, 0
    while True:
        page = await store.streams(plan.model, "", cursor, PAGE_STREAMS)
        for key, value in zip(page.keys, await store.load(page.keys), strict=True):
            if isinstance(value, CarryError):
                raise value
            header = None if value is None else StateHeader.decode(value)
            if header is None or header.is_tombstone:
                continue
            if header.fingerprint.hex() != plan.fingerprint:
                bucket = plan.bucket_of(plan.partition_of(key.stream))
                rows.append((bucket, key.stream, header.epoch, header.tag, header.position))
                live += 1
        cursor = page.cursor
        if cursor is None or len(rows) >= PART_STREAMS:
            frame = pl.DataFrame(rows, _TYPES, orient="row").sort("bucket", "stream")
            with replacing(folder / f"part-{part:05d}.parquet") as path:
                frame.write_parquet(path, row_group_size=max(1000, frame.height // 128))
            rows, part = [], part + 1
        if cursor is None:
            break
    if not live:
        raise BackfillError(
            f"expected live streams of model {plan.model!r} that another version computes, got "
            "none in this store; `carry backfill` without --version computes states for new streams"
        )
    with replacing(folder / COMPLETE) as path:
        path.touch()


def load_heads(out: Path, bucket: int) -> dict[str, StreamHead]:
    """The heads of the live streams of a bucket, by name."""
    parts = sorted((out / "heads").glob("part-*.parquet"))
    rows = pl.scan_parquet(parts, glob=False).filter(pl.col("bucket") == bucket)
    table = rows.drop("bucket").collect()
    # a listing may have a stream twice
    return {name: StreamHead(*head) for name, *head in table.iter_rows()}


class HeadCutter:
    """Cuts the events of a bucket at the positions of the live streams.

    Args:
        heads: of the live streams.
    """

    def __init__(self, heads: dict[str, StreamHead]):
        self._heads = heads
        self._stream, self._seen = "", 0

    def cut(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The rows in front of the positions; call it with all rows, sorted by stream."""
        if not rows.height:
            return rows
        seen = np.zeros(rows.height, np.int64)
        if rows["stream"][0] == self._stream:
            seen[(rows["stream"] == self._stream).to_numpy()] = self._seen
        positions = seen + rows.select(pl.int_range(pl.len()).over("stream")).to_series().to_numpy()
        self._stream, self._seen = rows["stream"][-1], int(positions[-1]) + 1
        runs = rows["stream"].rle().struct
        heads = map(self._heads.get, runs.field("value"))
        limits = [0 if head is None else head.position for head in heads]
        return rows.filter(positions < np.repeat(limits, runs.field("len").to_numpy()))

    def find_head(self, stream: str, position: int) -> StreamHead | None:
        """The head of a stream that was computed up to a position; None if it ended earlier."""
        head = self._heads.get(stream)
        return head if head is not None and head.position == position else None
