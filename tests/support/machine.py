"""The machine of a measurement: its description, its commit, its cores, and what processes use.

`describe_run` is what every benchmark and load test records about itself.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1
STORE_PREFIX = "valkey"


def describe_run() -> dict[str, str]:
    """Commit, machine and date of this run."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"commit": read_commit(), "machine": describe_machine(), "date": date}


@lru_cache
def describe_machine() -> str:
    """Processor, cores, memory, system and Python."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return (
        f"{name}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    )


@lru_cache
def read_commit() -> str:
    """The checked-out commit, marked `-dirty` where files differ; without git `CARRY_COMMIT`."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CARRY_COMMIT") or "unknown"
    return done.stdout.strip()


@dataclass(frozen=True, slots=True)
class Cores:
    """Cores of the servers, and of everything else; empty where they cannot be chosen."""

    servers: tuple[int, ...]
    others: tuple[int, ...]

    @classmethod
    def first_and_last(cls) -> Cores:
        """The first core of this process for the servers, the last for store and generator."""
        if not hasattr(os, "sched_getaffinity"):
            return cls((), ())
        cores = sorted(os.sched_getaffinity(0))
        return cls((), ()) if len(cores) < 2 else cls((cores[0],), (cores[-1],))

    @property
    def everything(self) -> tuple[int, ...]:
        """Both sides together."""
        return tuple(sorted({*self.servers, *self.others}))

    def describe(self) -> str:
        """One line for the head of a report."""
        if not self.servers:
            return "not pinned (one core, or no affinity here): servers and generator share cores"
        return f"servers on core {self.servers[0]}, store and generator on core {self.others[0]}"


def pin_process(cores: Sequence[int]) -> None:
    """Move this process to these cores, where they can be chosen."""
    if cores:
        os.sched_setaffinity(0, cores)


def pin_child(cores: Sequence[int]) -> Callable[[], None]:
    """A `preexec_fn`: moves a child to these cores and ends it with its parent."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        pin_process(cores)
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return prepare


def is_running(pid: int) -> bool:
    """Whether a thread of a process runs, or waits for a core; False where that cannot be read."""
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # the thread has ended
            if path.read_text().rpartition(") ")[2].startswith("R"):
                return True
    return False


@dataclass(frozen=True, slots=True)
class Usage:
    """Processor time and memory of a process with its children."""

    cpu_s: float
    memory_bytes: int


def read_usage(pid: int) -> Usage:
    """User and system time and memory of a process tree, without an embedded store.

    What workers share, as forks of one process, counts once.
    """
    cpu_s, private_bytes, shared_bytes = 0.0, 0, 0
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        try:
            if process.pid != pid and process.name().startswith(STORE_PREFIX):
                continue
            times = process.cpu_times()
            cpu_s += times.user + times.system
            memory = process.memory_full_info()
            private_bytes += memory.uss
            shared_bytes = max(shared_bytes, memory.rss - memory.uss)
        except psutil.NoSuchProcess:
            continue
    return Usage(cpu_s, private_bytes + shared_bytes)


def measure_busy_cores(seconds: float) -> float:
    """Cores in use by the whole machine, averaged over some seconds."""
    return float(sum(psutil.cpu_percent(seconds, percpu=True)) / 100)
