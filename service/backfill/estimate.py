"""The dry run of a backfill: what it would do and what it would take, from its first rows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from models.spec.model import schema_of
from service.backfill.bucket import compute_bucket
from service.backfill.machine import COMMAND_BYTES, PROCESS_BYTES
from service.backfill.plan import FOLDERS, BackfillError, Job
from service.backfill.report import list_rejected, rejected_lines, show_bytes
from service.backfill.rows import RowReader
from service.backfill.shuffle import write_unit
from service.backfill.source import read_batches

SAMPLE_ROWS = 50_000


def estimate(job: Job, processes: int) -> Iterator[str]:
    """Measure the first rows of a history; yields what all of it would take, as lines for people.

    Writes nothing into the output folder.

    Raises:
        BackfillError, ModelsError: the history is rejected, or it has no rows.
    """
    source = job.plan.sources[0]
    with tempfile.TemporaryDirectory(prefix="carry-dry-run-") as folder:
        plan = msgspec.structs.replace(job.plan, buckets=1, version=False)
        sample = job._replace(plan=plan, out=Path(folder))
        for name in FOLDERS:
            (sample.out / name).mkdir()
        reader = RowReader(plan, schema_of(job.spec), 0)
        started_s = time.perf_counter()
        batch = next(read_batches(source, reader.names, reader.required, SAMPLE_ROWS), None)
        if batch is None:
            raise BackfillError(f"{source.path}: expected at least one row of events, got none")
        write_unit(sample, 0, reader.read(batch))
        shuffle_s = time.perf_counter() - started_s
        compute_bucket(sample, 0)  # opens the network
        started_s = time.perf_counter()
        record = compute_bucket(sample, 0)
        compute_s = time.perf_counter() - started_s
        shuffle_bytes = sample.unit(0).stat().st_size
        rejected = list_rejected(sample)
    scale = plan.rows / len(batch.rows)
    parallel_scale = scale / min(processes, max(1, plan.rows // SAMPLE_ROWS))
    shuffle_s, compute_s = shuffle_s * parallel_scale, compute_s * parallel_scale
    state_bytes = record.states_bytes / max(1, record.streams)
    yield (
        f"would compute about {plan.rows:,} events in {job.plan.buckets:,} buckets, by "
        f"{processes} processes"
    )
    yield (
        f"about {show_seconds(shuffle_s + compute_s)}: shuffle {show_seconds(shuffle_s)}, compute "
        f"{show_seconds(compute_s)}"
    )
    yield (
        f"disk: outputs {show_bytes(record.outputs_bytes * scale)}, states {state_bytes:,.0f} "
        f"bytes a stream, and meanwhile {show_bytes(shuffle_bytes * scale)} of the shuffle"
    )
    yield f"memory: {show_bytes(COMMAND_BYTES + processes * PROCESS_BYTES)}"
    for line in rejected_lines(rejected):
        yield f"of the first {len(batch.rows):,} rows: {line}"


def show_seconds(seconds: float) -> str:
    """A duration for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
