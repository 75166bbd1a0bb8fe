"""Purchases of CDNOW's customers, 1997 and 1998, as events of streams.

The data are those of the package `lifetimes` (MIT), the master file that Fader and Hardie made
known: all purchases up to June 1998 of the 23,570 customers who first bought in the first
quarter of 1997. An event is a day on which a customer bought something, a stream a customer.

`again` is a label: whether the customer bought again within 30 days. It is known only 30 days
later, so an event has none if those days reach past a border of the splits: no
label of a training event looks into the months that choose the epoch, none of theirs into those
held out, and none past the end of the data.

Invariant: an event depends on nothing after its own day. The same data give the same frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta

import polars as pl

from models.errors import ModelsError
from models.training.files import package_folder

WITHIN_DAYS = 30
VALIDATE_FROM, TEST_FROM, END = date(1997, 10, 1), date(1998, 1, 1), date(1998, 7, 1)
"""The borders; `spec.yaml` names the first two."""


def purchase_events(borders: Sequence[date] = (VALIDATE_FROM, TEST_FROM, END)) -> pl.DataFrame:
    """All purchases as events of streams, streams one after another.

    Args:
        borders: days at which splits begin, and the day after the last of the data.

    Returns:
        67,591 rows, sorted by customer and day: `customer`, `bought` (a day), `discs` (how many
        CDs that day), `dollars` (what they cost), `wait` (days since the customer's purchase
        before, null at the first) and `again` (bought again within 30 days; null if that is
        not known before the next border).

    Raises:
        ModelsError: the package `lifetimes` is not installed or holds no such data.
    """
    days = _read().group_by("customer", "bought").agg(pl.col("discs", "dollars").sum())
    ordered = days.sort("customer", "bought").with_columns(
        wait=pl.col("bought").diff().over("customer").dt.total_days()
    )
    until_next = pl.col("wait").shift(-1).over("customer")
    next_border = pl.coalesce(
        pl.when(pl.col("bought") < border).then(pl.lit(border)) for border in sorted(borders)
    )
    is_known = pl.col("bought") + timedelta(days=WITHIN_DAYS) < next_border
    return ordered.with_columns(
        again=pl.when(is_known).then((until_next <= WITHIN_DAYS).fill_null(value=False))
    )


def _read() -> pl.DataFrame:
    path = package_folder("lifetimes") / "datasets" / "CDNOW_master.txt"
    try:
        lines = path.read_text(encoding="ascii").splitlines()[1:]
        cells = [line.split() for line in lines]
        return pl.DataFrame(
            {
                "customer": [customer for customer, _, _, _ in cells],
                "bought": pl.Series([day for _, day, _, _ in cells]).str.to_date("%Y%m%d"),
                "discs": [int(discs) for _, _, discs, _ in cells],
                "dollars": [float(dollars) for _, _, _, dollars in cells],
            }
        )
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise ModelsError(f"{path}: expected the purchases of CDNOW: {error}") from error
