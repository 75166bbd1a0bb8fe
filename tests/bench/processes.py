"""Processes on cores of their own: servers under test, stores, and helpers of the benchmark."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.support.machine import REPOSITORY, pin_child, wait_until

STARTS_WITHIN_S = 180.0
ENDS_WITHIN_S = 60.0


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
        CannotStartError: it ended, or took too long.
    """
    try:
        value = wait_until(
            lambda: process.poll() is not None or condition(), "a start", STARTS_WITHIN_S
        )
    except TimeoutError as error:
        raise CannotStartError(f"{error}:\n{read_tail(log)}") from error
    if process.poll() is not None:
        raise CannotStartError(f"{process.args!r} ended while it started:\n{read_tail(log)}")
    return value


def read_tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-2000:] if log.exists() else ""


def helper_process(
    cores: Sequence[int], prepare: Callable[..., None], *arguments: Any
) -> ProcessPoolExecutor:
    """An executor of one process on these cores, which calls `prepare` first."""
    return ProcessPoolExecutor(
        1, get_context("spawn"), initializer=_initialise, initargs=(cores, prepare, arguments)
    )


def _initialise(cores: Sequence[int], prepare: Callable[..., None], arguments: Any) -> None:
    pin_child(cores)()
    prepare(*arguments)
