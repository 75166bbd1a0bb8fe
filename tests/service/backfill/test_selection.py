"""Duplicates and the events of halted streams are left out, wherever the pieces are cut."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from service.backfill.plan import Plan
from service.backfill.selection import RowSelector

SCHEMA: dict[str, Any] = {"stream": pl.String, "order": pl.Int64, ".x": pl.Float64}


def plan(*, drop_duplicates: bool = False) -> Plan:
    return Plan(
        model="small",
        fingerprint="",
        sources=(),
        stream="stream",
        order="at",
        partitions=1,
        buckets=1,
        drop_duplicates=drop_duplicates,
    )


def table(rows: list[tuple[Any, ...]], **more: Any) -> pl.DataFrame:
    frame = pl.DataFrame(rows, {**SCHEMA, **more}, orient="row")
    return frame.with_columns(
        bucket=pl.lit(0, pl.UInt32),
        file=pl.lit(0, pl.UInt32),
        row=pl.int_range(pl.len(), dtype=pl.UInt64),
    )


def select(selector: RowSelector, frame: pl.DataFrame, rows: int) -> tuple[list[int], list[int]]:
    """The numbers of the rows that are computed, and of those of halted streams."""
    parts = [selector.select(piece) for piece in frame.iter_slices(rows)]
    computed = pl.concat([part[0].select("row") for part in parts])
    ended = pl.concat([part[1].select("row") for part in parts])
    return computed["row"].to_list(), ended["row"].to_list()


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_events_that_equal_the_one_before_are_counted_and_left_out_if_asked(rows: int) -> None:
    frame = table(
        [
            *[("a", 1, 1.0), ("a", 1, 1.0), ("a", 1, 2.0), ("a", 1, 1.0)],
            *[("b", 1, 1.0), ("b", 2, None), ("b", 2, None), ("b", 2, None), ("b", 3, None)],
        ]
    )
    kept = RowSelector(plan())
    assert select(kept, frame, rows) == ([*range(9)], [])
    dropped = RowSelector(plan(drop_duplicates=True))
    assert select(dropped, frame, rows) == ([0, 2, 3, 4, 5, 8], [])
    assert kept.duplicates == dropped.duplicates == 3


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_events_with_the_place_of_another_are_left_out(rows: int) -> None:
    """As in two exports that overlap: ties are in the order of the files."""
    places = {"source": pl.String, "offset": pl.UInt64, "sequence": pl.UInt64}
    frame = table(
        [
            *[("a", 1, 1.0, "in", 5, 0), ("a", 1, 2.0, "in", 6, 0)],
            *[("a", 1, 1.0, "in", 5, 0), ("a", 1, 2.0, "in", 6, 0)],
            *[("a", 1, 1.0, "in", 5, 1), ("a", 1, 1.0, "on", 5, 0)],
            *[("a", 2, 1.0, "in", None, None), ("a", 2, 1.0, "in", None, None)],
            ("b", 2, 1.0, "in", 5, 0),
        ],
        **places,
    )
    selector = RowSelector(plan())
    assert select(selector, frame, rows) == ([0, 1, 4, 5, 6, 7, 8], [])
    assert selector.duplicates == 2


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_a_halted_stream_ends_before_its_first_rejected_event(rows: int) -> None:
    frame = table(
        [
            *[("a", 1, 1.0, False), ("a", 2, 1.0, False)],
            *[("b", 1, 1.0, False), ("b", 2, None, True), ("b", 3, 1.0, False)],
            *[("b", 4, None, True), ("b", 5, 1.0, False)],
            *[("c", 1, None, True), ("d", 1, 1.0, False)],
        ],
        rejected=pl.Boolean,
    )
    selector = RowSelector(plan())
    assert select(selector, frame, rows) == ([0, 1, 2, 8], [4, 6])
    assert selector.halted == 2


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_a_damaged_duplicate_does_not_end_its_stream(rows: int) -> None:
    places = {"source": pl.String, "offset": pl.UInt64, "sequence": pl.UInt64}
    frame = table(
        [
            *[("a", 1, 1.0, "in", 5, 0, False), ("a", 1, None, "in", 5, 0, True)],
            *[("a", 2, 1.0, "in", 6, 0, False), ("a", 3, None, "in", 7, 0, True)],
            *[("a", 3, 1.0, "in", 7, 0, False), ("a", 4, 1.0, "in", 8, 0, False)],
        ],
        **places,
        rejected=pl.Boolean,
    )
    selector = RowSelector(plan())
    assert select(selector, frame, rows) == ([0, 2], [5])
    assert (selector.halted, selector.duplicates) == (1, 2)
