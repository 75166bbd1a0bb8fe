"""Processes on cores of their own: servers under test, and helpers of the benchmark."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.support.machine import REPOSITORY, pin_child
from tests.support.servers import until

STARTS_WITHIN_S = 180.0
ENDS_WITHIN_S = 60.0
PR_SET_TIMERSLACK = 29


class CannotStartError(Exception):
    """A server did not start; the message holds the end of its log."""


@contextmanager
def running_process(
    command: Sequence[str],
    cores: Sequence[int],
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path = REPOSITORY,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process without inherited settings of Carry; ends with the block and with this one."""
    inherited = {name: value for name, value in os.environ.items() if name[:6] != "CARRY_"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**inherited, **(environment or {})},
            preexec_fn=pin_child(cores),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def await_start(process: subprocess.Popen[bytes], condition: Callable[[], Any], log: Path) -> Any:
    """Wait until a starting process meets a condition, and return the condition's value.

    Raises:
        CannotStartError: it ended.
        AssertionError: it took too long.
    """
    value = until(lambda: process.poll() is not None or condition(), "a start", STARTS_WITHIN_S)
    if process.poll() is not None:
        tail = log.read_text(errors="replace")[-2000:]
        raise CannotStartError(f"{process.args!r} ended:\n{tail}")
    return value


def helper_process(cores: Sequence[int]) -> ProcessPoolExecutor:
    """An executor of one process on these cores, without garbage collection, timers exact."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare, initargs=(cores,))


def _prepare(cores: Sequence[int]) -> None:
    pin_child(cores)()
    gc.disable()
    if sys.platform == "linux":
        # Otherwise the kernel may send each request of an open loop 50 us late.
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
