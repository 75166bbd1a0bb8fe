"""Runs `carry` as a process of its own: commands configure the logs of their whole process."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.support.forks import COMMAND, Fork


@dataclass(frozen=True, slots=True)
class Result:
    """What a command printed, and its exit status."""

    exit_code: int
    stdout: bytes
    stderr: str


def carry(*words: str | Path, data: bytes = b"", **environment: str) -> Result:
    """Run a command with `data` as its standard input, and further variables."""
    with ExitStack() as stack:
        stdin, stdout, stderr = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        stdin.write(data)
        stdin.seek(0)
        command, variables = [COMMAND, *map(str, words)], {**os.environ, **environment}
        fork = Fork(command, variables, [stdin, stdout, stderr], os.getcwd())
        exit_code = fork.wait(60)
        # the file's position is the command's too
        stdout.seek(0)
        stderr.seek(0)
        return Result(exit_code, stdout.read(), stderr.read().decode())
