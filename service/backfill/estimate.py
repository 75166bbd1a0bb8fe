"""The dry run of a backfill: what it would do and what it would take, from its first rows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from models.spec.model import schema_of
from service.backfill.bucket import compute_bucket
from service.backfill.machine import COMMAND_BYTES, PROCESS_BYTES
from service.backfill.plan import FOLDERS, BackfillError, Job
from service.backfill.report import show_bytes
from service.backfill.rows import RowReader
from service.backfill.shuffle import write_unit
from service.backfill.source import read_batches

SAMPLE_ROWS = 50_000


class Estimate(NamedTuple):
    """What a backfill would take.

    Attributes:
        rows: in its sources; of text files an estimate.
        buckets, processes: as of the run.
        shuffle_s, compute_s: seconds of each stage.
        shuffle_bytes, output_bytes: on disk; those of the shuffle are removed at the end.
        state_bytes: of each stream.
        memory_bytes: of all processes.
        sample: rows that this was measured on.
        rejected: rows of the sample that cannot be read, by reason.
    """

    rows: int
    buckets: int
    processes: int
    shuffle_s: float
    compute_s: float
    shuffle_bytes: float
    output_bytes: float
    state_bytes: float
    memory_bytes: int
    sample: int
    rejected: dict[str, int]

    def lines(self) -> Iterator[str]:
        """The estimate as lines for people."""
        yield (
            f"would compute about {self.rows:,} events in {self.buckets:,} buckets, by "
            f"{self.processes} processes"
        )
        seconds = self.shuffle_s + self.compute_s
        yield (
            f"about {show_seconds(seconds)}: shuffle {show_seconds(self.shuffle_s)}, compute "
            f"{show_seconds(self.compute_s)}"
        )
        yield (
            f"disk: outputs {show_bytes(self.output_bytes)}, states {self.state_bytes:,.0f} bytes "
            f"a stream, and meanwhile {show_bytes(self.shuffle_bytes)} of the shuffle"
        )
        yield f"memory: {show_bytes(self.memory_bytes)}"
        for reason, count in self.rejected.items():
            yield f"rejected {count:,} of the first {self.sample:,} rows: {reason}"


def estimate(job: Job, processes: int) -> Estimate:
    """Measure the first rows of a history; writes nothing into its folder.

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
        unit = reader.read(batch)
        write_unit(sample, 0, unit)
        shuffle_s = time.perf_counter() - started_s
        compute_bucket(sample, 0)  # opens the network
        started_s = time.perf_counter()
        record = compute_bucket(sample, 0)
        compute_s = time.perf_counter() - started_s
        shuffle_bytes = sample.unit(0).stat().st_size
    count = min(processes, max(1, plan.rows // SAMPLE_ROWS))
    scale = plan.rows / len(batch.rows)
    return Estimate(
        rows=plan.rows,
        buckets=job.plan.buckets,
        processes=processes,
        shuffle_s=shuffle_s * scale / count,
        compute_s=compute_s * scale / count,
        shuffle_bytes=shuffle_bytes * scale,
        output_bytes=record.outputs_bytes * scale,
        state_bytes=record.states_bytes / max(1, record.streams),
        memory_bytes=COMMAND_BYTES + processes * PROCESS_BYTES,
        sample=len(batch.rows),
        rejected=unit.reasons(),
    )


def show_seconds(seconds: float) -> str:
    """A duration for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
