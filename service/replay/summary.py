"""The result of a replay, as plain data, as text, and as an exit status.

Exit statuses: 0 no fault; 1 an output beyond the contract, a wrong position or another
fault; 2 the replay could not be finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from service.replay.metrics import Counted
from service.replay.skill import Skill
from service.replay.tally import Tally
from service.replay.verify import Verification

RECENT = 256
SHOWN_FAULTS = 10


@dataclass(frozen=True, slots=True)
class Summary:
    """A finished replay.

    Attributes:
        streams: how many there were.
        resumed: how many streams had a position above 0 at the start.
        positions_checked: whether every stream's final position was asked for.
    """

    model: str
    version: str
    streams: int
    resumed: int
    tally: Tally
    counted: Counted
    skill: Sequence[Skill]
    positions_checked: bool
    verification: Verification | None

    @property
    def failed(self) -> bool:
        """Whether the service broke its contract."""
        beyond = self.verification is not None and not self.verification.holds
        return beyond or self.tally.fault_count > 0

    def as_data(self) -> dict[str, Any]:
        """Plain data for a report file."""
        tally = {name: getattr(self.tally, name) for name in Tally.__slots__}
        latencies_s = tally.pop("latencies_s")
        return {
            "model": self.model,
            "version": self.version,
            "streams": self.streams,
            "resumed": self.resumed,
            **tally,
            "problems": dict(self.tally.problems),
            "events_per_s": _rate(self.tally),
            "p50_ms": percentile_ms(latencies_s, 50),
            "p99_ms": percentile_ms(latencies_s, 99),
            "service": asdict(self.counted),
            "skill": [asdict(skill) for skill in self.skill],
            "verification": None if self.verification is None else asdict(self.verification),
            "failed": self.failed,
        }

    def print(self, console: Console) -> None:
        """Print a table of two columns: name and figure."""
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self._rows():
            table.add_row(name, value)
        console.print(table, markup=False)
        for fault in self.tally.faults[:SHOWN_FAULTS]:
            console.print(f"fault: {fault}", markup=False, highlight=False)
        more = self.tally.fault_count - SHOWN_FAULTS
        if more > 0:
            console.print(f"and {more} more faults", highlight=False)

    def _rows(self) -> Iterator[tuple[str, str]]:
        tally = self.tally
        resumed = f", {self.resumed} of them resumed" if self.resumed else ""
        yield "model", f"{self.model} {self.version}"
        yield "streams", f"{self.streams:,}{resumed}"
        yield "events", f"{tally.events:,} in {tally.wall_s:.1f} s, {_rate(tally):,.0f}/s"
        yield "chunks", f"{tally.chunks:,} cuts in {tally.requests:,} requests"
        yield (
            "latency",
            f"p50 {percentile_ms(tally.latencies_s, 50):.1f} ms, "
            f"p99 {percentile_ms(tally.latencies_s, 99):.1f} ms",
        )
        yield "sent twice", f"{tally.duplicates:,} chunks; {tally.replayed:,} replies replayed"
        by_code = ", ".join(f"{code} {count}" for code, count in sorted(tally.problems.items()))
        yield "retries", f"{tally.retries:,}" + (f" ({by_code})" if by_code else "")
        yield "silence", f"no reply for {tally.silence_s:.1f} s at the longest"
        if tally.fell_back:
            yield "fell back", f"{tally.fell_back:,} times, {tally.lost:,} events sent again"
        if tally.skipped:
            yield "skipped", f"{tally.skipped:,} events whose stored replies had expired"
        yield from self._service_rows()
        for skill in self.skill:
            scores = ", ".join(f"{name} {value:.4f}" for name, value in skill.scores.items())
            yield f"skill of {skill.output}", f"{scores} over {skill.count:,} events"
        yield from self._verify_rows()

    def _service_rows(self) -> Iterator[tuple[str, str]]:
        growth = self.counted
        if growth.conflicts is not None and growth.replays is not None:
            yield "conflicts", f"{growth.conflicts:,.0f}; {growth.replays:,.0f} replays"
        if growth.cache_hits is not None and growth.cache_misses is not None:
            lookups = growth.cache_hits + growth.cache_misses
            share = f", {growth.cache_hits / lookups:.1%}" if lookups else ""
            yield "cache", f"{growth.cache_hits:,.0f} hits of {lookups:,.0f}{share}"
        if growth.batches and growth.mean_batch is not None:
            shared = (
                "" if growth.shared_batches is None else f", {growth.shared_batches:,.0f} shared"
            )
            most = "" if growth.largest_batch is None else f", none above {growth.largest_batch:g}"
            yield "batches", f"{growth.batches:,.0f}{shared}, {growth.mean_batch:.2f} streams{most}"

    def _verify_rows(self) -> Iterator[tuple[str, str]]:
        if self.positions_checked:
            wrong = sum("expected position" in fault for fault in self.tally.faults)
            yield "positions", f"{wrong} wrong" if wrong else f"all {self.streams:,} right"
        if self.verification is None:
            return
        for check in self.verification.outputs:
            place = f" at {check.stream}[{check.step}]" if check.stream else ""
            verdict = "within" if check.holds else f"BEYOND, {check.beyond:,} values"
            yield (
                f"verify {check.name}",
                f"{verdict}: |a-b| - 1e-5|b| at most {check.excess:.2e} (bound 1e-5){place}, "
                f"|a-b| at most {check.difference:.2e}",
            )
        missing = self.verification.missing
        rest = f", {missing:,} were not received by this run" if missing else ""
        yield "verified", f"{self.verification.compared:,} events' outputs{rest}"


class ProgressBar:
    """A bar with events/s and latency on a terminal; nothing elsewhere."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self._progress = Progress(
            TextColumn("replay"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} events"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[latency]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, total: int, done: int) -> None:
        """`done` of `total` events were consumed before the replay."""
        self._task = self._progress.add_task(
            "replay", total=total, completed=done, rate="", latency=""
        )

    def show(self, done: int, tally: Tally) -> None:
        """`done` events are consumed now."""
        if self._task is None or self._progress.disable:
            return
        speed = self._progress.tasks[0].speed
        recent = tally.latencies_s[-RECENT:]
        self._progress.update(
            self._task,
            completed=done,
            rate="" if speed is None else f"{speed:,.0f}/s",
            latency=f"p50 {percentile_ms(recent, 50):.1f} ms" if recent else "",
        )


def percentile_ms(latencies_s: Sequence[float], percent: float) -> float:
    """A percentile in milliseconds; 0 of nothing."""
    return float(np.percentile(latencies_s, percent) * 1000) if len(latencies_s) else 0.0


def _rate(tally: Tally) -> float:
    return tally.events / tally.wall_s if tally.wall_s else 0.0
