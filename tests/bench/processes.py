"""Processes pinned to their own cores: servers to compare with, and helpers of the benchmark."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from tests.support.machine import REPOSITORY, pin_child

PR_SET_TIMERSLACK = 29


@contextmanager
def running_process(
    command: Sequence[str], cores: Sequence[int], log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block and with this one."""
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            preexec_fn=pin_child(cores),
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()


def helper_process(cores: Sequence[int]) -> ProcessPoolExecutor:
    """An executor of one process on these cores, without garbage collection, timers exact."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare, initargs=(cores,))


def _prepare(cores: Sequence[int]) -> None:
    pin_child(cores)()
    gc.disable()
    if sys.platform == "linux":
        # Otherwise the kernel may send each request of an open loop 50 us late.
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
