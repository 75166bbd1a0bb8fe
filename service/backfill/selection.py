"""Which rows of a bucket are computed: neither duplicates nor the events of halted streams."""

from __future__ import annotations

import polars as pl

from service.backfill.plan import Plan

HALTED = "after an event of the stream that was rejected"
OFFSET = "offset"
MARK_COLUMNS = ["source", OFFSET, "sequence"]
"""Columns with the source mark of an event: its topic, and its offset there."""


class RowSelector:
    """Selects the rows of pieces that follow each other.

    Duplicates are events of a stream with the same source mark; in data without offsets, events
    that equal the one before in everything, which are left out only if the plan says so.

    Attributes:
        duplicates: found so far.
        halted: streams that end before a rejected event, so far.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        self._before: pl.DataFrame | None = None
        self._halted: str | None = None
        self.duplicates = self.halted = 0

    def select(self, piece: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The rows of a piece that are computed, and those of halted streams that are not."""
        if not piece.height:
            return piece, piece
        is_duplicate = self._find_duplicates(piece)
        self.duplicates += int(is_duplicate.sum())
        if OFFSET in piece.columns or self._plan.drop_duplicates:
            piece = piece.filter(~is_duplicate)
        if not piece.height:
            return piece, piece
        if "rejected" in piece.columns:
            ended = (pl.col("stream") == (self._halted or "")) | pl.col("rejected")
            marked = piece.with_columns(ended=ended.cum_max().over("stream"))
        else:
            marked = piece.with_columns(ended=False)
        rest = marked.filter("ended")
        if rest.height:
            first = int(rest["stream"][0] == self._halted)
            self.halted += rest["stream"].n_unique() - first
            last = marked.row(-1, named=True)
            self._halted = last["stream"] if last["ended"] else None
            rest = rest.filter(~pl.col("rejected"))
        return marked.filter(~pl.col("ended")).drop("ended"), rest

    def _find_duplicates(self, piece: pl.DataFrame) -> pl.Series:
        """Whether each row is a duplicate, of one in the pieces before too."""
        has_marks = OFFSET in piece.columns
        rows = piece.select("stream", "order", *MARK_COLUMNS) if has_marks else piece
        before = rows.head(0) if self._before is None else self._before
        rows = pl.concat([before, rows])
        if has_marks:
            key = pl.struct("stream", *MARK_COLUMNS)
            repeats = rows.select(~key.is_first_distinct() & pl.col(OFFSET).is_not_null())
            # the same event of two files has the same order
            ends = piece.tail(1).select("stream", "order")
            self._before = rows.join(ends, on=["stream", "order"], how="semi").unique()
        else:
            content = pl.exclude("bucket", "file", "row")
            repeats = rows.select(
                pl.all_horizontal(content.eq_missing(content.shift(1)))
                & (pl.int_range(pl.len()) > 0)
            )
            self._before = piece.tail(1)
        return repeats.to_series().slice(before.height)
