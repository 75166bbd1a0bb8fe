"""The cores and the memory that the processes of a backfill may use."""

from __future__ import annotations

import os
from pathlib import Path

MIB = 2**20
COMMAND_BYTES = 200 * MIB
"""Memory of the process of the command."""

PROCESS_BYTES = 550 * MIB
"""Memory of a process that sorts or computes, about."""

LEAST_MEMORY_MIB = (COMMAND_BYTES + PROCESS_BYTES) // MIB
"""With less memory no process fits beside that of the command."""


def count_cores() -> int:
    """The cores that this process may use, by its affinity and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limit = int(quota) // int(period)
    except (OSError, ValueError):  # no such file, or no limit
        return cores or 1
    return max(1, min(cores or 1, limit))


def count_processes(memory_bytes: int, cores: int) -> int:
    """The processes that fit into a limit of memory, at least one."""
    return max(1, min(cores, (memory_bytes - COMMAND_BYTES) // PROCESS_BYTES))
