"""Stage 1: sorts the rows of every source by bucket, stream and order, into unit files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.events.columns import EventColumns
from models.events.frame import columns_from_frame
from models.events.schema import BooleanField, CategoricalField, EventSchema, TimestampField
from models.spec.model import schema_of
from models.training.files import read_data
from service.backfill.plan import Job, Plan, replacing
from service.core.values import StreamKey
from service.store.keys import KeySpace


class ShuffleTask(NamedTuple):
    """Rows of one source, which become one or more units.

    Attributes:
        source: its index in the plan.
        first_unit: number of the first unit.
        rows: about so many.
    """

    source: int
    first_unit: int
    rows: int


class ShuffleRecord(NamedTuple):
    """What became of the rows of a task."""

    rows: int
    rejected: int


def plan_tasks(plan: Plan) -> list[ShuffleTask]:
    """The tasks of the shuffle, with the numbers of their units."""
    return [ShuffleTask(at, at, source.rows) for at, source in enumerate(plan.sources)]


def write_units(job: Job, task: ShuffleTask) -> ShuffleRecord:
    """Write the units of a task that are not there yet."""
    plan, schema = job.plan, schema_of(job.spec)
    source = plan.sources[task.source]
    data = read_data(Path(source.path), schema)
    columns = columns_from_frame(schema, data)
    streams = data[plan.stream].cast(pl.String)
    space = KeySpace("backfill", plan.partitions)
    buckets = {
        name: plan.bucket_of(space.partition(StreamKey(plan.model, name)))
        for name in streams.unique()
    }
    order: Any = np.zeros(data.height, np.int64)
    if plan.order is not None:
        order = columns.values[plan.order]
    table: dict[str, Any] = {
        "bucket": streams.replace_strict(buckets, return_dtype=pl.UInt32),
        "stream": streams,
        "order": order,
        "file": np.full(data.height, task.source, np.uint32),
        "row": np.arange(1, data.height + 1, dtype=np.uint64),
    }
    for field in schema.fields:
        values = pl.Series(columns.values[field.name])
        present = pl.Series(columns.present[field.name])
        table[field.name] = values.to_frame().select(pl.when(present).then(pl.first())).to_series()
    frame = pl.DataFrame(table).sort("bucket", "stream", "order", "file", "row")
    with replacing(job.unit(task.first_unit)) as path:
        frame.write_parquet(path, row_group_size=max(1000, frame.height // 128))
    return ShuffleRecord(data.height, 0)


def read_bucket(job: Job, bucket: int) -> Iterator[pl.DataFrame]:
    """The rows of a bucket, sorted by stream, order, file and row, in pieces."""
    units = sorted((job.out / "shuffle").glob("unit-*.parquet"))
    rows = (
        pl.scan_parquet(units)
        .filter(pl.col("bucket") == bucket)
        .collect()
        .sort("stream", "order", "file", "row")
    )
    yield from rows.iter_slices(job.plan.piece_rows)


def read_columns(schema: EventSchema, frame: pl.DataFrame) -> EventColumns:
    """The events of rows of units."""
    present: dict[str, NDArray[np.bool_]] = {}
    values: dict[str, NDArray[Any]] = {}
    for field in schema.fields:
        column = frame[field.name]
        present[field.name] = column.is_not_null().to_numpy()
        match field:
            case CategoricalField():
                strings = np.empty(frame.height, object)
                strings[:] = column.fill_null("").to_list()
                values[field.name] = strings
            case BooleanField():
                values[field.name] = column.fill_null(False).to_numpy()
            case TimestampField():
                values[field.name] = column.fill_null(0).to_numpy()
            case _:
                values[field.name] = column.fill_null(0.0).to_numpy()
    return EventColumns(frame.height, present, values)
