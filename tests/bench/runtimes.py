"""The runtimes side by side, each in a process of its own on one thread.

python -m tests.bench.runtimes [--seconds S]

Two stacked LSTM(64) and Dense(8), F=16, as everywhere in the benchmarks. The two take turns,
shape by shape, and of the turns' times the smallest counts, so that a busy machine disturbs
both alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from models.artifact.artifact import load_artifact
from models.networks.initial_artifact import initialise_artifact
from models.spec.model import parse_spec
from service.engine.runtimes.loading import RUNTIMES, open_runtime

SHAPES = ((1, 1), (1, 16), (8, 16), (16, 16), (32, 16), (64, 16), (128, 16), (32, 64))
ROUNDS = 6
SPEC = {
    "name": "bench",
    "features": 16,
    "layers": [{"kind": "lstm", "units": 64}, {"kind": "lstm", "units": 64}],
    "heads": [{"kind": "dense", "name": "out", "units": 8}],
}


def serve(name: str, path: str, seconds: float) -> None:
    """The child: open, warm, then time one shape for each line on standard input."""
    artifact = load_artifact(Path(path))
    began_s = time.perf_counter()
    runtime = open_runtime(name, artifact, 1)
    runtime.warm()
    say({"ready_s": time.perf_counter() - began_s})
    while runtime.warm_next():
        pass
    random = np.random.default_rng(1)
    for line in sys.stdin:
        rows, steps = json.loads(line)
        if rows > runtime.max_batch:
            say({"call_s": None})
            continue
        padded, long = runtime.padded_shape(rows, steps)
        batch = random.normal(size=(padded, long, 16)).astype(np.float32)
        states = random.uniform(-1, 1, (padded, artifact.state.float_size)).astype(np.float32)
        lengths = np.full(padded, steps, np.int32)
        best, until_s = float("inf"), time.perf_counter() + seconds
        while (began_s := time.perf_counter()) < until_s:
            runtime.step(batch, lengths, states)
            best = min(best, time.perf_counter() - began_s)
        say({"call_s": best})
    say({"peak_mib": peak_mib()})


def say(fact: dict[str, Any]) -> None:
    print(json.dumps(fact), flush=True)


def peak_mib() -> float:
    """The process's largest resident set."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


class Child:
    """One runtime in its process."""

    def __init__(self, name: str, path: Path, seconds: float):
        command = [sys.executable, "-m", "tests.bench.runtimes", "--child", name, str(path)]
        self._process = subprocess.Popen(
            [*command, "--seconds", str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready_s: float = self._read()["ready_s"]

    def call_s(self, shape: tuple[int, int]) -> float | None:
        """The fastest call of a turn; None for a shape that the runtime does not take."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(shape) + "\n")
        self._process.stdin.flush()
        found: float | None = self._read()["call_s"]
        return found

    def end(self) -> float:
        """Its largest resident set, in MiB."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        peak: float = self._read()["peak_mib"]
        self._process.wait()
        return peak

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        fact: dict[str, Any] = json.loads(self._process.stdout.readline())
        return fact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.15, help="for each shape and turn")
    parser.add_argument("--child", nargs=2, metavar=("RUNTIME", "ARTIFACT"), help="used by itself")
    options = parser.parse_args()
    if options.child:
        serve(*options.child, options.seconds)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench"
        initialise_artifact(parse_spec(SPEC), path, seed=1)
        children = {name: Child(name, path, options.seconds) for name in RUNTIMES}
        best: dict[tuple[str, tuple[int, int]], float] = {}
        for _ in range(ROUNDS):
            for shape in SHAPES:
                for name, child in children.items():
                    call_s = child.call_s(shape)
                    if call_s is not None:
                        best[name, shape] = min(call_s, best.get((name, shape), call_s))
        peaks = {name: child.end() for name, child in children.items()}
    print("| streams x steps | " + " | ".join(RUNTIMES) + " |")
    print("| --- |" + " --- |" * len(RUNTIMES))
    for shape in SHAPES:
        cells = [_cell(best.get((name, shape)), shape[0]) for name in RUNTIMES]
        print(f"| {shape[0]} x {shape[1]} | " + " | ".join(cells) + " |")
    print("| ready after | " + " | ".join(f"{children[n].ready_s:.1f} s" for n in RUNTIMES) + " |")
    print("| memory | " + " | ".join(f"{peaks[name]:.0f} MiB" for name in RUNTIMES) + " |")


def _cell(call_s: float | None, rows: int) -> str:
    if call_s is None:
        return "not taken at once"
    return f"{call_s * 1e6:,.0f} us, {rows / call_s:,.0f} chunks/s"


if __name__ == "__main__":
    main()
