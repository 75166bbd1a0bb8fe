"""The machine of a run: its cores and who runs where, its description, and what processes use.

All server processes share the first core; the store and the generator share the last. Where a
machine has one core, or cannot pin, everything runs anywhere, and the description says so.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1
STORE_PREFIX = "valkey"


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores the two sides run on; empty where they cannot be chosen."""

    servers: tuple[int, ...]
    others: tuple[int, ...]

    @classmethod
    def chosen(cls) -> Cores:
        """The first and the last core of this process."""
        if not hasattr(os, "sched_getaffinity"):
            return cls((), ())
        cores = sorted(os.sched_getaffinity(0))
        return cls((), ()) if len(cores) < 2 else cls((cores[0],), (cores[-1],))

    @property
    def everything(self) -> tuple[int, ...]:
        """Both sides together."""
        return tuple(sorted({*self.servers, *self.others}))

    def describe(self) -> str:
        """One line for the head of the table."""
        if not self.servers:
            return "not pinned (one core, or no affinity here): servers and generator share cores"
        return f"servers on core {self.servers[0]}, store and generator on core {self.others[0]}"


def pinned(cores: Sequence[int]) -> Callable[[], None]:
    """What a child runs before its program: move to these cores, and end with its parent."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if cores:
            os.sched_setaffinity(0, cores)
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return prepare


def pin(cores: Sequence[int]) -> None:
    """Move this process to these cores, if they can be chosen."""
    if cores:
        os.sched_setaffinity(0, cores)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and all its children used so far, and hold now."""

    cpu_s: float
    rss_bytes: int


def usage(pid: int) -> Usage:
    """Of a process and its children, user and system time together; an embedded store apart."""
    cpu_s, rss_bytes = 0.0, 0
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        try:
            if process.pid != pid and process.name().startswith(STORE_PREFIX):
                continue
            times = process.cpu_times()
            cpu_s += times.user + times.system
            rss_bytes += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return Usage(cpu_s, rss_bytes)


def wait_until(condition: Callable[[], Any], what: str, within_s: float) -> Any:
    """Poll until something true comes, and return it.

    Raises:
        TimeoutError: it did not come in time.
    """
    ends_s = time.monotonic() + within_s
    while not (found := condition()):
        if time.monotonic() > ends_s:
            raise TimeoutError(f"{what} did not come within {within_s} s")
        time.sleep(0.01)
    return found


def busy_cores(seconds: float) -> float:
    """How many cores' worth of time others use now; to be asked before anything is started."""
    return float(sum(psutil.cpu_percent(seconds, percpu=True)) / 100)


@lru_cache
def describe() -> str:
    """Processor, cores, system and Python."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = found[0].partition(":")[2].strip() if found else name
    return (
        f"{name}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    )


@lru_cache
def commit() -> str:
    """The commit that is checked out, marked where files differ from it; `unknown` without git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
