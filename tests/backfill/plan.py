"""Plans a backfill on many machines, from rates that were measured on one core.

    python -m tests.backfill.plan --events 1e11 --streams 1e8 --machines 32

Stage 1 is as many equal tasks as there are units. In stage 2 the buckets are given to the workers
as the engine gives them, largest first. A stream is computed event by event, however many cores are
idle.
Networks and disks bound each stage from below.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from service.backfill.plan import PIECE_ROWS, UNIT_ROWS

HOUR_S: Final = 3600.0
LARGEST: Final = 200_000
"""Streams whose bucket is drawn one by one; the smaller ones fill all buckets evenly."""


@dataclass(frozen=True)
class Workload:
    """A history and a cluster.

    Attributes:
        events, streams: of the history.
        exponent: the n-th longest stream has a share in proportion to n**-exponent.
        skew: share of all events in one further stream.
        machines, cores: workers, one for each core.
        buckets: at most the partitions of the store.
        unit_rows: rows of a file of the shuffle.
        disk_mb_s: what a machine reads and writes of the shared folder together.
        opens_per_s: files that the shared folder opens, for all machines together.
    """

    events: float = 1e11
    streams: float = 1e8
    exponent: float = 0.8
    skew: float = 0.0
    machines: int = 32
    cores: int = 16
    buckets: int = 1024
    unit_rows: int = UNIT_ROWS
    disk_mb_s: float = 1000.0
    opens_per_s: float = 50_000.0


@dataclass(frozen=True)
class Rates:
    """What was measured on one core; `python -m tests.backfill rates` prints it.

    Attributes:
        shuffle_events_s: stage 1, events of a worker.
        compute_events_s: stage 2, events of a worker with many streams.
        alone_events_s: stage 2, events of one stream that is computed alone.
        open_ms: stage 2, of a bucket in each unit: its footer, and row groups shared with others.
        source_bytes, shuffle_bytes, output_bytes: of an event.
        state_bytes: of a stream.
        load_streams_s: streams that one process loads into the store.
    """

    shuffle_events_s: float = 1.7e6
    compute_events_s: float = 3.4e5
    alone_events_s: float = 2.6e5
    open_ms: float = 1.0
    source_bytes: float = 12.4
    shuffle_bytes: float = 26.9
    output_bytes: float = 16.8
    state_bytes: float = 1166.0
    load_streams_s: float = 2e4

    def options(self) -> list[tuple[str, float]]:
        """The options of this program, and their values."""
        return [(_option(each.name), getattr(self, each.name)) for each in fields(self)]


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        shuffle_s, compute_s, load_s: of the stages and the load into a store.
        busy: share of the workers' time in stage 2 in which they compute.
        bound_by: what stage 2 waits for at its end.
        shuffle_tb, output_tb, state_tb: on the shared folder.
        opens: files opened by buckets.
        machine_hours: of all machines, until the last bucket.
    """

    shuffle_s: float
    compute_s: float
    load_s: float
    busy: float
    bound_by: str
    shuffle_tb: float
    output_tb: float
    state_tb: float
    opens: float
    machine_hours: float


def draw_buckets(workload: Workload) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw the events and the longest stream of each bucket, float64 [B] each."""
    random = np.random.default_rng(1)
    ranks = np.arange(1, min(workload.streams, LARGEST) + 1, dtype=np.float64)
    large = ranks**-workload.exponent
    power = 1 - workload.exponent
    # the sum over all streams, those beyond the largest by its integral
    total = large.sum() + (workload.streams**power - len(ranks) ** power) / power
    large *= workload.events * (1 - workload.skew) / total
    rest = workload.events * (1 - workload.skew) - large.sum()
    if workload.skew:
        large = np.append(large, workload.events * workload.skew)
    places = random.integers(0, workload.buckets, len(large))
    events = np.full(workload.buckets, rest / workload.buckets)
    np.add.at(events, places, large)
    longest = np.zeros(workload.buckets)
    np.maximum.at(longest, places, large)
    return events, longest


def schedule(seconds: Sequence[float], workers: int) -> float:
    """Give tasks to workers, largest first, and return when the last one ends."""
    free = [0.0] * workers
    for task in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + task)
    return max(free)


def plan(workload: Workload, rates: Rates) -> Plan:
    """Plan a run."""
    workers = workload.machines * workload.cores
    cluster_bytes_s = workload.machines * workload.disk_mb_s * 1e6
    units = max(1.0, workload.events / workload.unit_rows)
    unit_s = workload.events / units / rates.shuffle_events_s
    moved = workload.events * (rates.source_bytes + rates.shuffle_bytes)
    shuffle_s = max(np.ceil(units / workers) * unit_s, moved / cluster_bytes_s)

    events, longest = draw_buckets(workload)
    # pieces of a longer stream are computed one after the other
    alone = np.where(longest > PIECE_ROWS, longest, 0.0)
    seconds = (events - alone) / rates.compute_events_s + alone / rates.alone_events_s
    seconds += units * rates.open_ms / 1000
    # the rows of a bucket that is larger than a unit are written and read a second time
    is_large = events > workload.unit_rows
    seconds += events * is_large / rates.shuffle_events_s
    opens = units * workload.buckets
    states = workload.streams * rates.state_bytes
    moved = float((events * (1 + 2 * is_large)).sum()) * rates.shuffle_bytes
    moved += workload.events * rates.output_bytes + states
    bounds = {
        "workers": schedule(seconds.tolist(), workers),
        "bandwidth": moved / cluster_bytes_s,
        "opening files": opens / workload.opens_per_s,
    }
    bound_by = max(bounds, key=lambda name: bounds[name])
    compute_s = bounds[bound_by]
    if bound_by == "workers":
        last = int(seconds.argmax())
        is_one = seconds[last] > 0.95 * compute_s and alone[last] > events[last] / 2
        bound_by = "the longest stream" if is_one else "cores"
    return Plan(
        shuffle_s=float(shuffle_s),
        compute_s=float(compute_s),
        load_s=workload.streams / rates.load_streams_s,
        busy=float(seconds.sum() / (workers * compute_s)),
        bound_by=bound_by,
        shuffle_tb=workload.events * rates.shuffle_bytes / 1e12,
        output_tb=workload.events * rates.output_bytes / 1e12,
        state_tb=states / 1e12,
        opens=opens,
        machine_hours=float((shuffle_s + compute_s) * workload.machines / HOUR_S),
    )


def describe(workload: Workload, made: Plan) -> list[str]:
    """The plan as lines of `name: value`."""
    return [
        f"workers: {workload.machines * workload.cores}, buckets: {workload.buckets:,}, "
        f"units: {workload.events / workload.unit_rows:,.0f}",
        f"shuffle: {made.shuffle_s / HOUR_S:.2f} h, {made.shuffle_tb:.1f} TB",
        f"buckets: {made.compute_s / HOUR_S:.2f} h, bound by {made.bound_by}, "
        f"{made.busy:.0%} busy, {made.opens / 1e6:,.0f} million opened files",
        f"outputs: {made.output_tb:.1f} TB, states: {made.state_tb:.2f} TB",
        f"load: {made.load_s / HOUR_S:.1f} h by one process",
        f"machine hours: {made.machine_hours:,.0f}",
    ]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan of the options."""
    parser = argparse.ArgumentParser(prog="python -m tests.backfill.plan", description=__doc__)
    for group in (Workload, Rates):
        for each in fields(group):
            kind = type(each.default)
            # 1e8 for a number of streams, and for one of machines
            parser.add_argument(
                _option(each.name),
                type=lambda text, kind=kind: kind(float(text)),
                default=each.default,
                help=f"({each.default:,})",
            )
    chosen = vars(parser.parse_args(arguments))
    workload = Workload(**{each.name: chosen[each.name] for each in fields(Workload)})
    rates = Rates(**{each.name: chosen[each.name] for each in fields(Rates)})
    print(*describe(workload, plan(workload, rates)), sep="\n")


if __name__ == "__main__":
    main()
