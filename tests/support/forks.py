"""Starts `carry` in forks of a process that has imported it, for a fifth of the processor time.

One process per test worker, the fork server, imports Carry's modules. For each start it forks a
process, which runs the installed console script in a session of its own, with the given
environment, working directory and standard streams. Only the imports are shared, which have the
PYTHONPATH of the test run. A `sitecustomize` on another one runs in the fork; other modules there
need the command itself.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, NoReturn

COMMAND = str(Path(sys.executable).with_name("carry"))
"""The installed command."""
PYTHONPATH = os.environ.get("PYTHONPATH")
"""That of the test run, which a test may change in its own environment."""
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
"""Of the fork server: a process with threads should not be forked."""
REQUEST_BYTES = 1 << 20


class Fork:
    """A process of the command, with the attributes of a `Popen`, for several threads."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        streams: Sequence[IO[bytes] | int],
        folder: str | None = None,
    ):
        """Start `command`, of which the first word is `COMMAND`, with stdin, stdout and stderr."""
        self.returncode: int | None = None
        self._lock = threading.Lock()
        self._status, status = os.pipe()
        # closed last: while a thread waits, its number must not become that of another file
        weakref.finalize(self, os.close, self._status)
        request = json.dumps({"command": command, "environment": {**environment}, "folder": folder})
        files = [each if isinstance(each, int) else each.fileno() for each in streams]
        socket.send_fds(fork_server(), [request.encode()], [*files, status])
        os.close(status)
        self.pid = self._read()

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        with self._lock:
            if self.returncode is None and self._is_readable(0):
                self.returncode = self._read()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status."""
        if self._is_readable(timeout) and (status := self.poll()) is not None:
            return status
        raise subprocess.TimeoutExpired("carry", timeout or 0)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has exited."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has exited since
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _is_readable(self, timeout: float | None) -> bool:
        """Whether the status, or the end of the pipe behind it, comes in time."""
        return bool(select.select([self._status], [], [], timeout)[0])

    def _read(self) -> int:
        number = os.read(self._status, 4)
        assert number, "the fork server has ended"
        return int.from_bytes(number, signed=True)


@cache
def fork_server() -> socket.socket:
    """The connection to this process's fork server, which ends with it."""
    environment = {**os.environ, **ENVIRONMENT}
    environment.pop("PYTHONPATH", None)
    if PYTHONPATH is not None:
        environment["PYTHONPATH"] = PYTHONPATH
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
            process_group=0,
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(requests: socket.socket) -> None:
    """Fork a process for each request, and report its exit."""
    running: dict[int, int] = {}

    def report_exits(*_: object) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                status = running.pop(ended[0])
                _write(status, os.waitstatus_to_exitcode(ended[1]))
                os.close(status)

    signal.signal(signal.SIGCHLD, report_exits)
    while True:
        data, received, _, _ = socket.recv_fds(requests, REQUEST_BYTES, 4)
        if not data:
            return
        *files, status = received
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        if (pid := os.fork()) == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            for number in (requests.detach(), status, *running.values()):
                os.close(number)
            _run(files, **json.loads(data))
        running[pid] = status
        _write(status, pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        for number in files:
            os.close(number)


def _write(status: int, number: int) -> None:
    """Write to a pipe, unless nobody waits for its number any more."""
    with suppress(BrokenPipeError):
        os.write(status, number.to_bytes(4, signed=True))


def _run(
    streams: Sequence[int], command: list[str], environment: dict[str, str], folder: str | None
) -> NoReturn:
    """Become the console script; its exit is that of this process."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    sys.argv = command
    path = environment.get("PYTHONPATH")
    if path is not None and path != PYTHONPATH:
        exec(Path(path, "sitecustomize.py").read_text(), {"__name__": "sitecustomize"})
    runpy.run_path(command[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    import_module("carry.cli")
    import_module("service.serve").import_for_workers("onnxruntime")
    _serve(socket.socket(fileno=int(sys.argv[1])))
