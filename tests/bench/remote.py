"""Objects in processes and on cores of their own, called over pipes: the generator above all.

    python -m tests.bench.remote MODULE:CLASS [ARGUMENT...]

makes the object and answers calls, pickled on stdin and stdout, until stdin ends; so it ends
with whoever started it. `Remote` is the caller's side, `Driver` the generator so called.
"""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from tests.bench.generator import Load
from tests.bench.traffic import TrafficSpec
from tests.support.machine import REPOSITORY, pin_child


class HelperFailedError(Exception):
    """What a helper process found wrong, or that it ended."""


class Remote:
    """One helper process, used in a `with` block."""

    def __init__(self, target: str, cores: Sequence[int], *arguments: str):
        self._command = [sys.executable, "-m", "tests.bench.remote", target, *arguments]
        self._cores = cores
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            preexec_fn=pin_child(self._cores),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process = self._process
        if process is None:
            return
        if kind is not None:
            process.terminate()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method there and wait for its result.

        Raises:
            HelperFailedError: it failed, or its process is gone.
        """
        self.begin(method, *arguments)
        return self.finish()

    def begin(self, method: str, *arguments: Any) -> None:
        """Call a method there; `finish` waits for its result."""
        assert self._process is not None
        assert self._process.stdin is not None
        pickle.dump((method, arguments), self._process.stdin, pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()

    def finish(self) -> Any:
        """The result of the call that was begun."""
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            failed, result = pickle.load(self._process.stdout)
        except EOFError as error:
            raise HelperFailedError(f"{self._command} ended") from error
        if failed:
            raise HelperFailedError(result)
        return result


class Driver(Remote):
    """A load generator in its own process."""

    def __init__(self, cores: Sequence[int]):
        super().__init__("tests.bench.generator:Generator", cores)

    def __enter__(self) -> Self:
        super().__enter__()
        self.call("own_process")
        return self

    def traffic(self, key: str, spec: TrafficSpec) -> None:
        """Make the streams that later loads name by `key`."""
        self.call("traffic", key, spec)

    def closed(self, key: str, port: int, connections: int, seconds: float, least: int = 0) -> Load:
        """Closed loop; see `Generator.closed`."""
        load: Load = self.call("closed", key, port, connections, seconds, least)
        return load

    def open(
        self,
        key: str,
        port: int,
        rate_per_s: float,
        seconds: float,
        *,
        connections: int = 256,
        seed: int = 1,
    ) -> Load:
        """Open loop; see `Generator.open`."""
        load: Load = self.call("open", key, port, connections, rate_per_s, seconds, seed)
        return load


def main(target: str, *arguments: str) -> None:
    """Serve one object: (method, arguments) is answered by (whether it failed, result)."""
    module, _, name = target.partition(":")
    served = getattr(importlib.import_module(module), name)(*arguments)
    while True:
        try:
            method, values = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: tuple[bool, Any]
        try:
            answer = False, getattr(served, method)(*values)
        except Exception as error:
            answer = True, f"{type(error).__name__}: {error}"
        pickle.dump(answer, sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
