"""French rivers: daily weather and discharge of 19 catchments, 1999 to 2018, with a label.

`catchments.parquet` is of the R package airGRdatasets (CC BY 4.0, see `DATA.md`); `prepare.py`
writes it from the package's files.

An event is a day at the gauge, known when the day is over. The label `week` is known a week later:
whether the mean discharge of the next seven days is `low`, `normal` or `high` on the flow duration
curve of the catchment, that is, below what is exceeded on 80% of its days before `VALIDATE`, or
above what is exceeded on 20% of them.

Invariant: a day has no label if one of the seven has no discharge or is in a later split, so that
no label of a split depends on days after it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

TABLE = Path(__file__).parent / "catchments.parquet"
SPEC = Path(__file__).parent / "spec.yaml"
CATCHMENT, DAY, LABEL = "catchment", "day", "week"
CLASSES = ("low", "normal", "high")
AHEAD_DAYS = 7
LOW, HIGH = 0.2, 0.8
"""Quantiles of a catchment's discharges that separate the classes."""
VALIDATE, TEST = datetime(2011, 1, 1, tzinfo=UTC), datetime(2014, 1, 1, tzinfo=UTC)
"""The first days of the validation and of the test set, as in `spec.yaml`."""
MM_A_DAY = 1e6 / 86_400
"""Litres per second and square kilometre."""


def river_days() -> pl.DataFrame:
    """All days, catchment by catchment.

    Returns:
        138,795 rows: `catchment` (the gauge's code), `day` (UTC), `precipitation` and
        `evapotranspiration` (potential; mm), `temperature` (degrees Celsius), `discharge` (litres
        per second and square kilometre, or null) and the label `week`, or null.
    """
    split = (pl.col(DAY) >= VALIDATE).cast(pl.Int8) + (pl.col(DAY) >= TEST).cast(pl.Int8)
    ahead = pl.col("discharge").rolling_mean(AHEAD_DAYS).shift(-AHEAD_DAYS)
    known = split.shift(-AHEAD_DAYS) == split
    return (
        pl.read_parquet(TABLE)
        .with_columns((pl.col("discharge") * MM_A_DAY).round(3))
        .with_columns(pl.when(known).then(ahead).over(CATCHMENT).alias(LABEL))
        .with_columns(flow_class(pl.col(LABEL)).alias(LABEL))
    )


def flow_class(discharge: pl.Expr) -> pl.Expr:
    """The class of a discharge on the flow duration curve of its row's catchment, or null."""
    before = pl.col("discharge").filter(pl.col(DAY) < VALIDATE)
    low, high = (before.quantile(share, "linear").over(CATCHMENT) for share in (LOW, HIGH))
    return (
        pl.when(discharge < low)
        .then(pl.lit("low"))
        .when(discharge > high)
        .then(pl.lit("high"))
        .when(discharge.is_not_null())
        .then(pl.lit("normal"))
    )


def codes(frame: pl.DataFrame) -> NDArray[np.int64]:
    """The label of every day as an index of `CLASSES`, -1 without one, [rows]."""
    physical = frame[LABEL].cast(pl.Enum(CLASSES)).to_physical()
    return physical.cast(pl.Int64).fill_null(-1).to_numpy()
