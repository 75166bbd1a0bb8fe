"""The plan of a backfill: what its files depend on, and where they are.

The plan is in the output folder. A run continues if its own plan equals it: the same artifact, the
same sources, the same options. What the bytes of a bucket do not depend on is not part of it: the
engine, the number of processes, the machine.

    OUT/backfill.json                    the plan
    OUT/shuffle/unit-NNNNNN.parquet      sorted rows of one source; removed at the end
    OUT/rejected/unit-NNNNNN.parquet     rows of one source that were not read, with reasons
    OUT/rejected/bucket-NNNNN.parquet    events of one bucket that were not computed, with reasons
    OUT/outputs/bucket-NNNNN.parquet     outputs of the events of a range of partitions
    OUT/states/bucket-NNNNN.backup       the states after them, as `carry backup` writes them
    OUT/done/bucket-NNNNN.json           the record of a finished bucket
    OUT/heads/part-NNNNN.parquet         the heads of live streams, for another version's states
    OUT/report.json, throughput.png      the report, and a plot of the events done over time

A file is written under a temporary name, synced and renamed, so that none is ever incomplete.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.artifact.files import sync_directory
from models.spec.layout import output_spec
from models.spec.model import ModelSpec
from service.core.errors import OperatorError
from service.core.values import StreamKey
from service.store.keys import KeySpace

FORMAT = 1
PLAN = "backfill.json"
UNIT_ROWS = 400_000
"""Most rows of a unit, which one process sorts in memory."""

PIECE_ROWS = 262_144
"""Most events that one process computes together."""

BUCKET_ROWS = PIECE_ROWS
"""About as many events are in a bucket, if there are partitions enough."""

_UNIT_KEYS = 6
_USUAL_COLUMNS, _USUAL_VALUES = 16, 64
"""Columns of a unit, and values of an event while it is computed, with which so many rows fit into
the memory of a process."""

OnError = Literal["continue", "halt", "fail"]


class BackfillError(OperatorError):
    """A backfill that cannot start or continue."""


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of events, in the order in which they count.

    Attributes:
        path: as polars opens it: a path or a URL.
        kind: csv, jsonl or parquet.
        rows: number of rows; of a text file an estimate.
        size_bytes, modified_ns: to notice that the file was changed; 0 if unknown.
        table: the table whose file it is, with its version; empty if it is of none.
    """

    path: str
    kind: str
    rows: int
    size_bytes: int = 0
    modified_ns: int = 0
    table: str = ""


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the files of a run depend on.

    Attributes:
        model, fingerprint: of the artifact; the fingerprint in hexadecimal.
        sources: sorted by name.
        stream: the column with the name of each row's stream.
        order: the column that orders a stream's events; None for the order of the files. Ties are
            in the order of the files.
        partitions: of the store that the states are for.
        buckets: ranges of partitions.
        unit_rows, piece_rows: rows that are sorted and computed together.
        on_error: an event that cannot be read is left out (`continue`), ends its stream (`halt`),
            or ends the run (`fail`).
        drop_duplicates: whether an event that equals the one before in everything is left out.
        offset: the column with the offset that an event had in a topic; None: it had none.
        topic, topic_partition: this topic, and the column with its partition.
        version: whether the streams live, and the states are for another version of their model.
    """

    model: str
    fingerprint: str
    sources: tuple[Source, ...]
    stream: str
    order: str | None
    partitions: int
    buckets: int
    unit_rows: int = UNIT_ROWS
    piece_rows: int = PIECE_ROWS
    on_error: OnError = "continue"
    drop_duplicates: bool = False
    offset: str | None = None
    topic: str | None = None
    topic_partition: str | None = None
    version: bool = False
    format: int = FORMAT

    @property
    def rows(self) -> int:
        """Rows of all sources; an estimate if one is a text file."""
        return sum(source.rows for source in self.sources)

    def partition_of(self, stream: str) -> int:
        """The partition of a stream in the store."""
        return KeySpace("backfill", self.partitions).partition(StreamKey(self.model, stream))

    def bucket_of(self, partition: int) -> int:
        """The bucket of a partition of the store."""
        return partition * self.buckets // self.partitions


class Job(NamedTuple):
    """What every task of a run needs; sent to each process once.

    Attributes:
        out: the output folder, which every process sees.
        spec, weights: of the artifact.
    """

    plan: Plan
    out: Path
    spec: ModelSpec
    weights: dict[str, NDArray[np.float32]]

    def unit(self, number: int) -> Path:
        """The sorted rows of a unit."""
        return self.out / "shuffle" / f"unit-{number:06d}.parquet"

    def rejected_unit(self, number: int) -> Path:
        """The rows of a unit that were not read."""
        return self.out / "rejected" / f"unit-{number:06d}.parquet"

    def rejected_bucket(self, bucket: int) -> Path:
        """The events of a bucket that were not computed."""
        return self.out / "rejected" / f"bucket-{bucket:05d}.parquet"

    def outputs(self, bucket: int) -> Path:
        """The outputs of a bucket."""
        return self.out / "outputs" / f"bucket-{bucket:05d}.parquet"

    def states(self, bucket: int) -> Path:
        """The states of a bucket."""
        return self.out / "states" / f"bucket-{bucket:05d}.backup"

    def record(self, bucket: int) -> Path:
        """The record of a finished bucket."""
        return self.out / "done" / f"bucket-{bucket:05d}.json"


def read_plan(out: Path) -> Plan:
    """Read the plan of an output folder.

    Raises:
        BackfillError: it is not the folder of a backfill.
    """
    try:
        return msgspec.json.decode((out / PLAN).read_bytes(), type=Plan)
    except (OSError, msgspec.MsgspecError) as error:
        raise BackfillError(f"{out}: expected a folder of `carry backfill`: {error}") from error


def rows_in_memory(spec: ModelSpec) -> tuple[int, int]:
    """The rows of a unit and of a piece of a model: fewer, the more values an event has."""
    columns = _UNIT_KEYS + (len(spec.events.fields) if spec.events is not None else 0)
    values = columns + spec.input_features + output_spec(spec).size
    unit_rows = min(UNIT_ROWS, UNIT_ROWS * _USUAL_COLUMNS // columns)
    return unit_rows, min(PIECE_ROWS, PIECE_ROWS * _USUAL_VALUES // values)


def plan_buckets(rows: int, partitions: int) -> int:
    """The number of buckets for about that many rows."""
    return max(1, min(partitions, -(-rows // BUCKET_ROWS)))


FOLDERS = ("shuffle", "rejected", "outputs", "states", "done")
TEMPORARY = ".tmp"
COMPLETE = "complete"
"""Name or suffix of a mark that everything beside it was written."""

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_NOT_WRITTEN = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO}


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Replace a file by what is written at the yielded temporary path, whole or not at all.

    Raises:
        OSError: it cannot be written, for example because the disk is full; names the file.
    """
    temporary = file.parent / f".{file.name}.{secrets.token_hex(6)}{TEMPORARY}"
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(file)
        sync_directory(file.parent)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        code = error.errno if isinstance(error, OSError) else None
        # polars has the number in the message of an error of its own
        if code is None and (match := _OS_ERROR.search(str(error))):
            code = int(match[1])
        if code not in _NOT_WRITTEN:
            raise
        raise OSError(code, os.strerror(code), str(file)) from error
    finally:
        temporary.unlink(missing_ok=True)
