"""Measures a backfill from the outside: time, events/s by stage, memory, disk.

The memory is that of all processes of the command together, ten times a second: the resident sets,
in which shared pages count for each process, and the proportional ones, in which they count once.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from tests.backfill.runs import RECORDS, RESULTS, UNITS, Run

SAMPLE_S: Final = 0.1
MIB: Final = 2**20


@dataclass(frozen=True)
class Size:
    """What a run took.

    Attributes:
        seconds, cpu_s: of the whole run, of all its processes.
        rss_mib, pss_mib: the highest of all processes together.
        disk_mib: by folder of the results, the largest that it was.
        report: what the command wrote about itself.
    """

    seconds: float
    cpu_s: float
    rss_mib: float
    pss_mib: float
    disk_mib: dict[str, float]
    report: dict[str, Any]

    def lines(self) -> list[str]:
        """The figures as lines of `name: value`."""
        events, stages = self.report["events"], self.report["stages"].items()
        rates = ", ".join(f"{name} {each['events_per_s']:,.0f}" for name, each in stages)
        disk = ", ".join(f"{name} {size:,.0f}" for name, size in self.disk_mib.items())
        return [
            f"{events:,} events of {self.report['streams']:,} streams",
            f"seconds: {self.seconds:,.1f}, {events / self.seconds:,.0f} events/s ({rates})",
            f"CPU: {self.cpu_s:,.1f} s, {self.cpu_s / events * 1e6:.2f} us an event",
            f"peak memory: {self.rss_mib:,.0f} MiB resident, {self.pss_mib:,.0f} proportional",
            f"disk, MiB: {disk}",
        ]


def measure(run: Run) -> Size:
    """Run a backfill to its end.

    Raises:
        RuntimeError: it failed.
    """
    started_s, process = time.monotonic(), run.start()
    rss, pss, disk, cpu = 0, 0, {}, _Cpu()
    while process.poll() is None:
        tree = _tree(process)
        cpu.sample(tree)
        now = [_memory(each) for each in tree]
        rss, pss = max(rss, sum(r for r, _ in now)), max(pss, sum(p for _, p in now))
        for name, size in _sizes(run.out).items():
            disk[name] = max(disk.get(name, 0.0), size)
        time.sleep(SAMPLE_S)
    seconds = time.monotonic() - started_s
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}, see {run.log}")
    report = json.loads((run.out / "report.json").read_text())
    disk |= {name: max(disk.get(name, 0.0), size) for name, size in _sizes(run.out).items()}
    return Size(seconds, cpu.total_s(), rss / MIB, pss / MIB, disk, report)


class _Cpu:
    """The processor time of processes that come and go, up to the last sample of each."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], float] = {}

    def sample(self, processes: Sequence[psutil.Process]) -> None:
        for each in processes:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                times = each.cpu_times()
                self._seen[each.pid, each.create_time()] = times.user + times.system

    def total_s(self) -> float:
        return sum(self._seen.values())


def _tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    return []


def _memory(process: psutil.Process) -> tuple[int, int]:
    """Resident and proportional set of a process, in bytes."""
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
        found = process.memory_full_info()
        return found.rss, found.pss
    return 0, 0


def _sizes(out: Path) -> dict[str, float]:
    """MiB of each folder of the results."""
    sizes: dict[str, float] = {}
    for name in (UNITS, *RESULTS, RECORDS):
        total = 0
        for path in (out / name).rglob("*"):
            with suppress(OSError):  # renamed or removed meanwhile
                total += path.stat().st_size
        sizes[name] = total / MIB
    return sizes
