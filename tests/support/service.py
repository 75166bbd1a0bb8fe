"""Runs `carry serve` as a process, as its users do, and reaches it over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.forks import COMMAND, PYTHONPATH, Fork
from tests.support.servers import DEADLINE_S, until

READY_S = DEADLINE_S
POLL_S = 0.025
"""A start takes a second; frequent requests and reads of the log would slow it down."""


class Service:
    """One `carry serve` process and its log.

    Args:
        checkout: whose code it runs, by default this one's.
        prefix: of the command: the program that runs it, with its options.
        prepare: runs in its process first.

    Attributes:
        forks: whether it may start in a fork of a process that has imported it, as tests do;
            what is measured is the command itself.
    """

    forks = False

    def __init__(
        self,
        folder: Path,
        models: Path,
        *options: str,
        redis_url: str | None = None,
        checkout: Path | None = None,
        prefix: Sequence[str] = (),
        prepare: Callable[[], None] | None = None,
    ):
        self.folder = folder
        self._checkout, self._prepare = checkout, prepare
        self.data_dir = folder / "data"
        program = [COMMAND]
        if checkout is not None and not (checkout / "carry").is_dir():
            # a commit that has no package of that name; the command would run this checkout's code
            program = [sys.executable, "-m", "service.cli"]
        self._command = [
            *(*prefix, *program, "serve", "--port", "0"),
            *("--models", str(models), "--data-dir", str(self.data_dir), *options),
        ]
        if redis_url is not None:
            self._command += ["--redis-url", redis_url]
        self._log = folder / "service.log"
        self._from = 0
        self._may_fork = self._checkout is None and not prefix and prepare is None
        self.process: subprocess.Popen[bytes] | Fork | None = None
        self.url = ""

    def start(self, **environment: str) -> None:
        """Start the process and wait until it is ready."""
        self.launch(**environment)
        self.url = until(
            lambda: self.ended() or self._fact("port_bound", "url"), "its port", READY_S, POLL_S
        )
        assert not self.ended(), self.log()
        with httpx.Client(base_url=self.url, verify=False) as client:
            until(lambda: self.ended() or _is_ready(client), "the service", READY_S, POLL_S)
        assert not self.ended(), self.log()

    def launch(self, **environment: str) -> None:
        """Start the process; returns immediately."""
        inherited = {name: value for name, value in os.environ.items() if name[:6] != "CARRY_"}
        if self._checkout is not None:
            # the command imports the installed packages, whatever its working directory is
            given = environment.get("PYTHONPATH")
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (given, str(self._checkout))))
        self._from = self._log.stat().st_size if self._log.exists() else 0
        variables = {**inherited, **environment}
        with self._log.open("ab") as output:
            if self.forks and self._may_fork and _is_only_customised(variables):
                self.process = Fork(self._command, variables, [0, output, output])
                return
            self.process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=output,
                env=variables,
                start_new_session=True,
                cwd=self._checkout,
                preexec_fn=self._prepare,
            )

    def log(self) -> str:
        """Its output since the last start."""
        return self._log.read_bytes()[self._from :].decode(errors="replace")

    def whole_log(self) -> str:
        """Its output of all starts."""
        return self._log.read_text()

    def ended(self) -> bool:
        """Whether the process has exited."""
        return self.process.poll() is not None

    def lines(self, message: str = "") -> list[dict[str, Any]]:
        """The log lines with a message, by default all, since the last start.

        The last one is none of them while it is being written.
        """
        wanted = f'"message":"{message}"' if message else "{"
        written = self.log().rpartition("\n")[0].splitlines()
        return [json.loads(line) for line in written if line.startswith("{") and wanted in line]

    def _fact(self, message: str, name: str) -> Any:
        """A field of the last log line with a message, or None."""
        lines = self.lines(message)
        return lines[-1][name] if lines else None

    def ready_workers(self) -> list[int]:
        """The pids of the workers, in the order in which they became ready."""
        return [line["pid"] for line in self.lines("worker_ready")]

    def is_live(self) -> bool:
        """Whether its check of liveness succeeds."""
        return httpx.get(f"{self.url}/health/live", verify=False).status_code == 200

    def grpc_address(self) -> str:
        """Host and port of its gRPC server."""
        return f"127.0.0.1:{self._fact('grpc_port_bound', 'port')}"

    def valkey_pid(self) -> int:
        """The pid of its embedded server."""
        return int(json.loads((self.data_dir / "valkey.json").read_text())["pid"])

    def kill(self) -> None:
        """Send SIGKILL to the parent process alone."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def _is_only_customised(environment: Mapping[str, str]) -> bool:
    """Whether no module on PYTHONPATH is for Carry's own imports, but those of the test run."""
    path = environment.get("PYTHONPATH")
    return path in (None, PYTHONPATH) or Path(path, "sitecustomize.py").exists()


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.HTTPError:
        return False


LEAN_KERAS = """
import sys

sys.modules.update(dict.fromkeys(("pandas", "scipy", "sklearn")))
"""
"""A `sitecustomize` for Keras: it imports these packages if they are installed, for a second, and
in a deployment they are not."""

ONE_RUNG = """
from service.engine.runtimes import tensorflow

tensorflow.ROWS_AT = {64: (32,)}
tensorflow.DECODER_RUNGS = ((32, 1),)
"""
"""One with which TensorFlow compiles one program per network, not up to twelve."""


SLOW_WARM_UP = """
import sys, time
from service.engine.runtimes.onnx import OnnxRuntime

def slow(runtime):
    print("compiling", file=sys.stderr, flush=True)
    time.sleep(600)

OnnxRuntime.warm = slow
"""
"""A `sitecustomize` that makes the warm-up take ten minutes."""


def customise(folder: Path, code: str) -> None:
    """Write a `sitecustomize` that every process with this folder on its PYTHONPATH runs."""
    (folder / "sitecustomize.py").write_text(code)


def runtime_environment(runtime: str, folder: Path) -> dict[str, str]:
    """The environment of a service on a runtime, in which TensorFlow compiles as little as it can.

    Programs are compiled for one shape and hardly optimised; `tests/service/engine` tests all
    shapes, optimised.
    """
    if runtime != "tensorflow":
        return {"CARRY_RUNTIME": runtime}
    customisation = folder / "sitecustomize"
    customisation.mkdir(exist_ok=True)
    customise(customisation, LEAN_KERAS + ONE_RUNG)
    return {
        "CARRY_RUNTIME": runtime,
        "PYTHONPATH": str(customisation),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


@contextmanager
def running(folder: Path, models: Path, *options: str, **arguments: Any) -> Iterator[Service]:
    """Run a service; stop it afterwards, together with an orphaned embedded server.

    Args:
        arguments: variables of its environment, in capitals, and further arguments of `Service`.
    """
    environment = {name: value for name, value in arguments.items() if name.isupper()}
    process = {name: value for name, value in arguments.items() if not name.isupper()}
    service = Service(folder, models, *options, **process)
    try:
        service.start(**environment)
        yield service
    finally:
        if not service.ended():
            service.stop()
        elif (service.data_dir / "valkey.json").exists():
            os.kill(service.valkey_pid(), signal.SIGKILL)
