"""Starts child processes: as forks of this one, or as new interpreters.

A fork has what its parent has imported, in memory that both share until one of them changes it. The
parent must not have another thread, since a lock that it holds would stay locked in the child. A
fork keeps no descriptor of its parent but those that it is given, and receives no signal before it
has handlers of its own (`unblock_signals`): until then the parent's are installed.

A new interpreter is for a parent that has threads, and for systems other than Linux, where some
libraries do not support forks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing.process import BaseProcess
from typing import Any, Final, Protocol

SIGHUP: Final[signal.Signals | None] = getattr(signal, "SIGHUP", None)
"""None on Windows."""

CAN_FORK: Final = sys.platform == "linux"

WithoutThreads = Callable[[], AbstractContextManager[bool]]
"""Ends the other threads of a process for the time of a block, and yields whether they have ended;
starts them again after the block."""


class StartProcess(Protocol):
    """Starts a process that runs `main` with the arguments.

    Args:
        files: descriptors of the open files that the arguments use, which a fork keeps.

    Returns:
        None if no process can be started now.
    """

    def __call__(
        self, files: Sequence[int], main: Callable[..., None], *arguments: Any
    ) -> BaseProcess | None: ...


def spawn(files: Sequence[int], main: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a new interpreter."""
    process = multiprocessing.get_context("spawn").Process(target=main, args=arguments)
    process.start()
    return process


class Fork:
    """Forks this process; for its main thread.

    Args:
        without_threads: keeps this process without other threads during a fork; the default is
            for a process that has none.
    """

    def __init__(self, without_threads: WithoutThreads = lambda: nullcontext(True)):
        self._without_threads = without_threads

    def __call__(
        self, files: Sequence[int], main: Callable[..., None], *arguments: Any
    ) -> BaseProcess | None:
        """Start a fork."""
        with self._without_threads() as is_alone:
            if not is_alone:
                return None
            others = _open_files()
            for file in (0, 1, 2, *files):
                others.pop(file, None)
            context = multiprocessing.get_context("fork")
            process = context.Process(target=_run_fork, args=(others, main, *arguments))
            signal.pthread_sigmask(signal.SIG_BLOCK, _blocked_signals())
            try:
                process.start()
            finally:
                unblock_signals()
        return process


def unblock_signals() -> None:
    """Receive the signals that are blocked while a process forks; a fork calls it too."""
    if CAN_FORK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _blocked_signals())


def _blocked_signals() -> set[signal.Signals]:
    return {signal.SIGTERM, signal.SIGINT, *([] if SIGHUP is None else [SIGHUP])}


def _open_files() -> dict[int, os.stat_result]:
    """The open files of this process, by descriptor."""
    files = {}
    for name in os.listdir("/proc/self/fd"):
        # not the one that the list was read from
        with suppress(OSError):
            files[int(name)] = os.fstat(int(name))
    return files


def _run_fork(
    others: dict[int, os.stat_result], main: Callable[..., None], *arguments: Any
) -> None:
    """Main function of a fork.

    Args:
        others: files of the parent to close. The objects that own them are never deleted in the
            fork, which would close descriptors again: the frames of the parent's calls, below this
            one on the stack, refer to them.
    """
    for descriptor, file in others.items():
        # multiprocessing may close one before it forks, and use its number for its own pipes
        with suppress(OSError):
            if os.path.samestat(file, os.fstat(descriptor)):
                os.close(descriptor)
    main(*arguments)
