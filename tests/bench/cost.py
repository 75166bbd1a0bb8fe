"""The cost of a chunk that noise cannot touch: Python calls, allocations, instructions.

A server is stopped, the requests of a round are sent, and it goes on: so they arrive together,
however busy the machine is. What it does between two signals it counts itself
(`counting_site.py`), instructions by callgrind. A window is some rounds; the least of several
windows is kept, because what the service does once a second falls into some of them.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Final

import psutil

from models.artifact.artifact import Artifact
from tests.bench.generator import Connection
from tests.bench.traffic import Traffic
from tests.bench.workloads import Bodies, make_traffic
from tests.support.servers import until
from tests.support.service import Service, running

TOGETHER, STEPS = (1, 8, 32, 64), (16, 1)
"""The chunks that arrive together, and the events of a chunk."""

ITEMS: Final = 64
"""The chunks of one request for many streams."""

LONG_SEQUENCE: Final = 1_000_000
"""Chunks of a sequence that does not end while it is counted."""

LEAST_ROUNDS = 1
ANSWERED_S = 300.0
NETWORK_LIBRARIES = ("onnxruntime", "tensorflow")
FOLDER = Path(__file__).parent


def build_counters(folder: Path) -> Path:
    """Compile `counters.c`; the library."""
    library = folder / "counters.so"
    if not library.exists():
        compiler = shutil.which("cc")
        if compiler is None:
            raise OSError("expected a C compiler `cc` on the PATH, to build tests/bench/counters.c")
        options = ("-O2", "-shared", "-fPIC", "-o", library)
        subprocess.run([compiler, *options, FOLDER / "counters.c", "-ldl"], check=True)
    return library


class CountedServer:
    """A service that counts what it does, and the connections to it."""

    def __init__(self, service: Service, artifact: Artifact, folder: Path):
        self._artifact, self._folder = artifact, folder
        assert service.process is not None
        self._process = psutil.Process(service.process.pid)
        self._port = int(service.url.rpartition(":")[2])
        self._marks = folder / "marks"
        self._windows = 0

    def measure_all(self, windows: int, chunks: int) -> dict[str, float]:
        """What a chunk costs, by how many arrive together, its events, and what is counted."""
        # the first requests also end what the start has left to do
        self._measure(STEPS[0], max(TOGETHER), 0, chunks)
        loads: dict[str, tuple[int, int, dict[str, Any]]] = {
            f"{together} x {steps}": (steps, together, {})
            for steps, together in product(STEPS, TOGETHER)
        }
        for together in (1, 32):
            for name, media, sequence in (
                ("V2", "perf", LONG_SEQUENCE),
                ("V2 start", "perf", 1),
                ("V2 JSON", "perf-json", LONG_SEQUENCE),
            ):
                options = {"media": media, "sequence": sequence}
                loads[f"{together} x {STEPS[0]}, {name}"] = (STEPS[0], together, options)
        for media in ("msgpack", "json"):
            name = f"{ITEMS} x {STEPS[0]} in one request, {media}"
            loads[name] = (STEPS[0], 1, {"media": media, "items": ITEMS})
        return {
            f"{load}, {name}": count
            for load, (steps, together, options) in loads.items()
            for name, count in sorted(
                self._measure(steps, together, windows, chunks, **options).items()
            )
        }

    def _measure(
        self, steps: int, together: int, windows: int, chunks: int, **options: Any
    ) -> dict[str, float]:
        """What a chunk costs where some requests arrive together: the least of the windows.

        Args:
            windows: even, because calls and allocations are counted in turn.
            chunks: of a window, at least; some rounds without counting come first.
            options: of the requests, as for `make_traffic`.
        """
        prefix = f"{self._folder.name}-{self._windows}"
        of_round = together * options.get("items", 1)
        spec = make_traffic(self._artifact, Bodies.random(steps), prefix, of_round, **options)
        traffic, rounds = Traffic(spec), max(LEAST_ROUNDS, chunks // of_round)
        costs: dict[str, list[float]] = {}
        with ExitStack() as stack:
            connections = [Connection(self._port, ANSWERED_S) for _ in range(together)]
            for connection in connections:
                stack.callback(connection.close)
            for window in range(-1, windows):
                for _ in range(rounds):
                    self._send_round(traffic, connections)
                counted = self._mark()
                for name, count in counted.items() if window >= 0 else ():
                    costs.setdefault(name, []).append(count / (rounds * of_round))
        return {name: min(each) for name, each in costs.items()}

    def _send_round(self, traffic: Traffic, connections: Sequence[Connection]) -> None:
        """Send one request on each connection while the server is stopped, and read the replies."""
        self._process.suspend()
        until(lambda: self._process.status() == psutil.STATUS_STOPPED, "the server's stop")
        for connection in connections:
            request, connection.ticket = traffic.request()
            connection.sock.sendall(request)
        self._process.resume()
        for connection in connections:
            traffic.accept(connection.ticket, connection.receive())

    def _mark(self) -> dict[str, int]:
        """End a window: what was counted in it."""
        self._process.send_signal(signal.SIGUSR2)
        self._windows += 1
        lines = until(self._read_marks, "the server's count", ANSWERED_S)
        counts: dict[str, int] = json.loads(lines[-1])
        window = counts.pop("window")
        dump = self._folder / f"callgrind.{window + 1}"
        if dump.exists():
            counts |= read_instructions(dump)
            dump.unlink()
        return counts

    def _read_marks(self) -> list[str] | None:
        lines = self._marks.read_text().splitlines() if self._marks.exists() else []
        return lines if len(lines) == self._windows else None


def read_instructions(dump: Path) -> dict[str, int]:
    """The instructions of a window that callgrind wrote: all, and those of the runtime."""
    network, total, is_network, is_call = 0, 0, False, False
    names: dict[str, str] = {}
    for line in dump.open():
        if line.startswith("ob="):
            number, _, name = line[3:].strip().partition(" ")
            is_network = any(each in names.setdefault(number, name) for each in NETWORK_LIBRARIES)
        elif line.startswith("cob="):
            number, _, name = line[4:].strip().partition(" ")
            names.setdefault(number, name)
        elif line.startswith("calls="):
            is_call = True
        elif line[0] in "0123456789+-*":
            # the line after `calls=` is the cost of the called
            if not is_call:
                cost = int(line.split()[1])
                total += cost
                network += cost * is_network
            is_call = False
    return {"instructions": total, "instructions of the network": network}


@contextmanager
def counted_server(
    folder: Path,
    artifact: Artifact,
    store_url: str,
    runtime: str,
    *,
    instructions: bool = False,
    checkout: Path | None = None,
) -> Iterator[CountedServer]:
    """A service on a store, by its default settings.

    Args:
        instructions: whether callgrind counts them, instead of calls and allocations.
        checkout: whose code it runs, by default this one's.
    """
    library = build_counters(folder)
    site = folder / "site"
    site.mkdir()
    shutil.copyfile(FOLDER / "counting_site.py", site / "sitecustomize.py")
    environment = {
        "CARRY_RUNTIME": runtime,
        "COUNTING_LIBRARY": str(library),
        "COUNTING_MARKS": str(folder / "marks"),
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": str(site),
    }
    prefix: tuple[str, ...] = ()
    if instructions:
        environment |= {"COUNTING_INSTRUCTIONS": "1", "LD_PRELOAD": str(library)}
        prefix = (
            *("valgrind", "--tool=callgrind", "--instr-atstart=no", "-q"),
            f"--callgrind-out-file={folder / 'callgrind'}",
        )
    options: dict[str, Any] = {"redis_url": store_url, "checkout": checkout, "prefix": prefix}
    with running(folder, artifact.path, **options, **environment) as service:
        try:
            yield CountedServer(service, artifact, folder)
        finally:
            # its clock is too slow for a graceful shutdown
            service.kill()
