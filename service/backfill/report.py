"""The report of a backfill: counts, rejected events with file and row, rates, memory and disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from io import BytesIO
from typing import Any, NamedTuple

import polars as pl

from service.backfill.plan import Job
from service.backfill.record import BucketRecord

PLACES = 3
"""Files and rows that are named of each reason."""

STAGES = ("shuffle", "compute")


class Sample(NamedTuple):
    """How far a run was.

    Attributes:
        elapsed_s: since the run started.
        events: done in this stage by this run.
    """

    stage: str
    elapsed_s: float
    events: int


def make_report(
    job: Job, records: Iterable[BucketRecord], samples: list[Sample], peaks: dict[str, int]
) -> dict[str, Any]:
    """Make the report of a finished run, as plain data.

    Args:
        samples: of this run, in their order.
        peaks: the most memory of each of its processes, in bytes.
    """
    finished = list(records)
    rejected = list_rejected(job)
    return {
        "model": job.plan.model,
        "fingerprint": job.plan.fingerprint,
        "sources": len(job.plan.sources),
        "buckets": job.plan.buckets,
        "streams": sum(each.streams for each in finished),
        "events": sum(each.events for each in finished),
        "rejected_events": sum(each["events"] for each in rejected),
        "rejected": rejected,
        "halted_streams": sum(each.halted_streams for each in finished),
        "moved_streams": sum(each.moved_streams for each in finished),
        "duplicates": sum(each.duplicates for each in finished),
        "out_of_order": sum(each.out_of_order for each in finished),
        "stages": {stage: _measure_rate(samples, stage) for stage in STAGES},
        "seconds": round(samples[-1].elapsed_s, 3) if samples else 0.0,
        "peak_memory_bytes": sum(peaks.values()),
        "disk_bytes": {
            "outputs": sum(each.outputs_bytes for each in finished),
            "states": sum(each.states_bytes for each in finished),
            "shuffle": sum(file.stat().st_size for file in (job.out / "shuffle").glob("*")),
        },
    }


def list_rejected(job: Job) -> list[dict[str, Any]]:
    """The rejected events by column and reason, most frequent first, with the first places."""
    files = sorted((job.out / "rejected").glob("*.parquet"))
    if not files:
        return []
    place = pl.struct("file", "row").sort_by("file", "row").head(PLACES).alias("places")
    table = (
        pl.scan_parquet(files, glob=False)
        .group_by("column", "reason")
        .agg(pl.len().alias("events"), place)
        .sort("events", "column", "reason", descending=[True, False, False])
        .collect(engine="streaming")
    )
    return [
        {**row, "places": [f"{at['file']}, row {at['row']}" for at in row["places"]]}
        for row in table.iter_rows(named=True)
    ]


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines for people."""
    yield f"{report['events']:,} events of {report['streams']:,} streams"
    yield from rejected_lines(report["rejected"])
    if report["halted_streams"]:
        yield f"{report['halted_streams']:,} streams end before a rejected event"
    if report["duplicates"]:
        yield f"{report['duplicates']:,} duplicates"
    if report["out_of_order"]:
        yield (
            f"warning: {report['out_of_order']:,} events are earlier than one before them in their "
            "stream"
        )
    if report["moved_streams"]:
        yield (
            f"warning: {report['moved_streams']:,} streams have events of several partitions, and "
            "consumers skip only those of the last one"
        )
    for stage, rate in report["stages"].items():
        if rate["events"]:
            yield f"{stage}: {rate['events_per_s']:,.0f} events/s, {rate['seconds']:.1f} s"
    disk = report["disk_bytes"]
    yield (
        f"{report['seconds']:.1f} s, peak memory {show_bytes(report['peak_memory_bytes'])}, "
        f"outputs {show_bytes(disk['outputs'])}, states {show_bytes(disk['states'])}, "
        f"shuffle {show_bytes(disk['shuffle'])}"
    )


def rejected_lines(rejected: list[dict[str, Any]]) -> Iterator[str]:
    """The rejected events of `list_rejected` as lines for people."""
    for entry in rejected:
        column = f"{entry['column']}: " if entry["column"] else ""
        more = ", ..." if entry["events"] > len(entry["places"]) else ""
        places = "; ".join(entry["places"])
        yield f"rejected {entry['events']:,}: {column}{entry['reason']} ({places}{more})"


def show_bytes(count: float) -> str:
    """A size for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _measure_rate(samples: list[Sample], stage: str) -> dict[str, float]:
    own = [sample for sample in samples if sample.stage == stage]
    seconds = own[-1].elapsed_s - own[0].elapsed_s if own else 0.0
    events = own[-1].events if own else 0
    rate = events / seconds if seconds else 0.0
    return {"events": events, "seconds": round(seconds, 3), "events_per_s": round(rate, 1)}


def plot_throughput(samples: list[Sample]) -> bytes:
    """A plot of the events done over time, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for stage in STAGES:
        own = [sample for sample in samples if sample.stage == stage]
        rate = _measure_rate(samples, stage)["events_per_s"]
        axes.plot(
            [sample.elapsed_s for sample in own],
            [sample.events / 1e6 for sample in own],
            label=f"{stage}, {rate:,.0f} events/s",
        )
    axes.set(xlabel="seconds", ylabel="events, millions", title="Throughput")
    axes.legend()
    content = BytesIO()
    figure.savefig(content, format="png", dpi=90)
    return content.getvalue()
