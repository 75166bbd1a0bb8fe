"""Quix Streams beside a consumer, on librdkafka's mock broker: the processes, and their rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from tests.bench.generator import Load
from tests.bench.run import Bench, Server
from tests.bench.traffic import SAMPLED_CHUNKS, TrafficSpec, WrongReplyError
from tests.bench.workloads import (
    Bodies,
    FloatRows,
    check_answers,
    make_traffic,
    place_in_bursts,
)
from tests.support.machine import REPOSITORY, pin_child

PACKAGES = ("quixstreams==3.28.1", "onnxruntime", "numpy")
ENVIRONMENT = REPOSITORY / "build" / "quix"
"""Made at the first run, since the packages are of no use to the project."""

SCRIPT = REPOSITORY / "tests" / "bench" / "baselines" / "quix.py"
FIRST_EVENTS, LEAST_EVENTS = 200, 10_000


@dataclass
class QuixReader:
    """The application, and the process of the broker that feeds it.

    Attributes:
        server: the application; its state is local, so the store of its rows is idle.
    """

    server: Server
    processes: Sequence[subprocess.Popen[str]]  # the broker's is the first
    spec: TrafficSpec
    burst: int
    events: int = LEAST_EVENTS
    added: int = 0
    sampled: list[bytes] = field(default_factory=list)

    def measure(self, bench: Bench, row: str) -> None:
        """One more round of a backlog."""
        bench.measure(row, self.server, partial(self.drain, self.events))

    def drain(self, events: int) -> Load:
        """Add events, and wait for their outputs.

        Raises:
            WrongReplyError: some are missing, repeated or out of order.
        """
        broker = self.processes[0]
        assert broker.stdin is not None
        assert broker.stdout is not None
        numbers = range(self.added, self.added + events)
        self.added += events
        places = [place_in_bursts(number, self.burst, self.spec.streams) for number in numbers]
        added = [(self.spec.name(stream), self.spec.body(stream, at)) for stream, at in places]
        broker.stdin.write(json.dumps(added) + "\n")
        broker.stdin.flush()
        result = json.loads(broker.stdout.readline() or '{"missing": "all"}')
        if result["missing"]:
            raise WrongReplyError(f"Quix: {result['missing']} of {events} outputs are missing")
        found = [json.dumps(each).encode() for each in result["sampled"]]
        self.sampled += found[: SAMPLED_CHUNKS - len(self.sampled)]
        return Load(result["seconds"], np.array([np.nan]), events, events, 0.0)

    def end(self, bench: Bench, rows: Sequence[FloatRows]) -> None:
        """Compare the first outputs of one stream with the oracle's, and end the processes."""
        check_answers(bench.artifact, self.spec, rows, self.sampled)
        for process in self.processes:
            process.kill()


def start_quix(bench: Bench, burst: int) -> QuixReader | None:
    """A reader on a broker of its own; None where the packages cannot be installed."""
    python = _make_environment(bench)
    if python is None:
        return None
    artifact, bodies = bench.artifact, Bodies.random(1)
    spec = make_traffic(artifact, bodies, f"quix-{burst}", bench.options.streams)
    config = {
        "graph": str(artifact.path / "graph.onnx"),
        "state": artifact.state.float_size,
        "output": artifact.outputs.outputs[0].name,
        "folder": str(bench.folder / f"quix-{burst}"),
        "bodies": [value[1:-1].decode() for value in spec.values],
        "sampled": spec.name(0),
    }
    variables = {**os.environ, "BENCH_QUIX": json.dumps(config)}

    def start(cores: Sequence[int], *words: str) -> subprocess.Popen[str]:
        with (bench.folder / "quix.log").open("ab") as log:
            process = subprocess.Popen(
                [str(python), str(SCRIPT), *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=variables,
                text=True,
                preexec_fn=pin_child(cores),
            )
        bench.start(process)
        bench.scope.callback(process.kill)
        return process

    broker = start(bench.cores.others, "broker")
    assert broker.stdout is not None
    app = start(bench.cores.servers, "app", broker.stdout.readline().strip())
    server = Server("quix", 0, app.pid, artifact, bench.store)
    reader = QuixReader(server, (broker, app), spec, burst)
    reader.drain(FIRST_EVENTS)
    rate_per_s = reader.drain(LEAST_EVENTS).chunks_per_s
    reader.events = max(LEAST_EVENTS, round(rate_per_s * bench.options.seconds))
    return reader


def _make_environment(bench: Bench) -> Path | None:
    """The interpreter of an environment with the packages; it is made once."""
    python = ENVIRONMENT / "bin" / "python"
    commands = [
        [sys.executable, "-m", "venv", str(ENVIRONMENT)],
        [str(python), "-m", "pip", "install", "--quiet", *PACKAGES],
    ]
    try:
        for command in commands if not python.exists() else commands[1:]:
            subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        bench.note(f"consume: without Quix Streams: {reason.splitlines()[-1]}")
        return None
    return python
