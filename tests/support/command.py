"""Runs `carry` as a process of its own: commands configure the logs of their whole process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Result:
    """What a command printed, and its exit status."""

    exit_code: int
    stdout: bytes
    stderr: str


def carry(*words: str | Path, data: bytes = b"") -> Result:
    """Run a command with `data` as its standard input."""
    command = [sys.executable, "-m", "service.cli", *map(str, words)]
    done = subprocess.run(command, input=data, capture_output=True, timeout=60, check=False)
    return Result(done.returncode, done.stdout, done.stderr.decode())
