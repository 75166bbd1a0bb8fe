"""Each section of the benchmark runs, for a moment, with everything it starts."""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest

from tests.bench import backfill, consume, curves, detection, peer, run, sections, workloads
from tests.bench.results import MISSED, Results, check_targets
from tests.bench.run import UNANSWERED, Bench, Options
from tests.support.forks import fork_server
from tests.support.machine import REPOSITORY, Cores

pytestmark = pytest.mark.harness

CARRY = "carry-onnxruntime"
FIGURES = {
    "cost": {"onnxruntime 64 x 1, calls", "onnxruntime 64 x 1, allocations"},
    "peak": {f"{CARRY} over fastapi"},
    "single": {f"{CARRY} over fastapi"},
    "many": {f"{CARRY} over compute"},
    "compute": {"onnxruntime 8 x 16, us CPU/chunk"},
    "threads": {"onnxruntime 8 units, 1 x 16: CPU of two over one"},
    "detection": {
        "32 x 16, a season, us/stream more",
        "served, 4 target(s): CPU of a chunk with over without",
    },
    "backfill": {f"standard: table over {way}" for way in ("network", "streams", "predict")},
    "latency": {
        f"{CARRY} p99 beside long chunks over without",
        f"{CARRY} p99 at 50 % over unloaded p50, over the echo's",
    },
    "curve-steps": {"1/compute", "16/compute"},
    "curve-units": {"8/compute"},
    "curve-layers": {"1/compute"},
    "curve-streams": {"10000 over 1000, cold", "bytes over bound"},
    "curve-media": {"CPU of a chunk, v2 over json", "CPU of a chunk, websocket over json"},
    "curve-workers": {"CPU of a chunk, 2 workers over 1, own", "16 cores, estimated chunks/s, own"},
    "cold": {f"{CARRY} s"},
    "workers": {f"{CARRY} lost", f"{CARRY} 2 over 1, 2 connections, at most"},
    "events": {f"{CARRY} events over inputs"},
    "overload": {
        *(f"{CARRY} goodput over peak", f"{CARRY} goodput over peak, by CPU"),
        *(f"{CARRY} p99 of accepted chunks, s", f"{CARRY} rejected share"),
        f"{CARRY} memory, last over first",
    },
    "consume": {
        *(f"{CARRY} 1 over loop", f"{CARRY} 1 over http, by CPU", f"{CARRY} 16 over loop, by CPU"),
        *(f"rebalance: a consumer is {what}, s" for what in ("killed", "added")),
    },
    "kinds": {f"{CARRY} forecast over lstm, by CPU"},
    "beside": {f"{load} 2: chunks/s, this over the other" for load in sections.BESIDE_LOADS},
}
"""Figures of the sections that have any."""

MORE_COUNTS = 2
"""Of costs beyond their targets: what else a service does on a busy machine only adds to them."""

KINDS = ("lstm", "bidirectional-blocks", "bidirectional-predict", "forecast")
SMALL = {"layers": [{"kind": "lstm", "units": 8}]}
BRIEF = {
    run: {"WARM_S": 0.05, "REST_S": 0.02, "RESTS_WITHIN_S": 0.0},
    sections: {
        "RACES": 2,
        "BATCHES": (1, 8),
        "OVERLOAD_PARTS": 3,
        # as many at once as there are streams: the peak may be measured while the machine is slow
        "OVERLOAD_STREAMS": 256,
        "OVERLOAD_TIMES": 20.0,
        "OVERLOAD_QUEUE_WAIT_S": 0.02,
        "BESIDE_CONNECTIONS": (2,),
        "WORKER_CONNECTIONS": (2,),
        "THREADS_UNITS": (8,),
        "LENGTHS": (1, 16),
        "LONG_STEPS": 500,
    },
    curves: {
        "CURVES": {
            **curves.CURVES,
            "units": partial(curves.measure_networks, networks={8: SMALL}),
            "layers": partial(curves.measure_networks, networks={1: SMALL}),
        },
        "LENGTHS": (1, 16),
        "MODELS": (1, 2),
        "CONNECTION_COUNTS": (1, 40),
        "WORKERS": (1, 2),
    },
    detection: {"CALLS": 2},
    backfill: {"EVENTS": 2_000, "STREAMS": 20, "LOOP_EVENTS": 200, "PREDICT_EVENTS": 400},
    consume: {"LEAST_EVENTS": 100, "SAMPLED_CHUNKS": 2, "SETTLED_S": 0.1},
    workloads: {
        "COMPUTE_S": 0.01,
        "KINDS": {name: workloads.KINDS[name] for name in KINDS},
    },
}


@pytest.fixture(scope="module")
def helpers() -> Iterator[list[ProcessPoolExecutor]]:
    """As many helper processes as a section has at a time: each imports for a second."""
    with run.helper_process(()) as one, run.helper_process(()) as two:
        for each in (one, two):
            each.submit(os.getpid).result()
        yield [one, two]


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helpers: list[ProcessPoolExecutor]
) -> Iterator[Bench]:
    """A tiny run; no process that it started is left afterwards."""

    @contextmanager
    def shared_helper(cores: Sequence[int]) -> Iterator[ProcessPoolExecutor]:
        helper = helpers.pop()
        try:
            yield helper
        finally:
            helpers.append(helper)

    for module in (run, sections, curves, backfill, detection):
        monkeypatch.setattr(module, "helper_process", shared_helper)
    for module, values in BRIEF.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    options = Options(rounds=2, streams=64, many_streams=10_000, beside=REPOSITORY)
    options.instructions = False
    options.runtimes = ("onnxruntime",)
    # without cores to choose, only the end of a run that is killed needs a `preexec_fn`
    for module, name in ((run, "pin_child"), (run, "prepare_store"), (consume, "pin_child")):
        monkeypatch.setattr(module, name, lambda cores: None)
    resource_tracker.ensure_running()
    fork_server()
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    about = {"commit": "none", "machine": "none", "date": "now"}
    yield Bench(options, Cores((), ()), tmp_path, Results(about))
    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after <= before


def find_missed(results: Results) -> set[str]:
    """The names of the figures beyond their targets."""
    return {name for name, *_, verdict in check_targets(results) if verdict == MISSED}


@pytest.mark.parametrize("section", sections.SECTIONS)
def test_section_runs(section: str, bench: Bench) -> None:
    # processor time is counted in steps of 10 ms
    bench.options.seconds = {"overload": 1.0, "beside": 0.3}.get(section, 0.05)
    if section == "beside":
        bench.options.loads = sections.BESIDE_LOADS
    else:
        bench.options.beside = None
    sections.run_section(bench, section)
    results = bench.results
    assert all(len(row) >= 2 for row in results.rows.values())
    assert results.figures.keys() >= {f"{section}/{name}" for name in FIGURES.get(section, ())}
    if section == "cost":
        # a change that makes the path heavier fails here; docs/how-to/benchmark.md
        heavier = find_missed(results)
        for _ in range(MORE_COUNTS if heavier else 0):
            bench.folder = bench.folder / "again"
            bench.folder.mkdir()
            sections.run_section(bench, section)
            heavier &= find_missed(results)
        assert not heavier, check_targets(results)
    if section == "workers":
        assert results.figures[f"workers/{CARRY} lost"].high == 0
    if section == "overload":
        # `make overload` bounds what depends on the speed of the machine; the work that a rejected
        # chunk costs is bounded by tests/service/transports/v1/test_chunk_path.py
        assert results.figures[f"overload/{CARRY} rejected share"].high > 0
        assert not [note for note in results.notes if UNANSWERED in note]


TOOL = """#!{python}
import json, sys
from urllib.request import Request, urlopen

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if options["-i"] == "grpc":
    with open("{failures}", "a") as file:
        print("failed", file=file)
    sys.exit("no gRPC here")
name, _, shape = options["--shape"].partition(":")
assert shape == "16,16", shape
tensor = {{"name": name, "datatype": "FP32", "shape": [1, 16, 16], "data": [0.5] * 256}}
content = {{"inputs": [tensor], "parameters": {{"sequence_id": "tool"}}}}
for _ in range(4):
    url = f"http://{{options['-u']}}/v2/models/{{options['-m']}}/infer"
    urlopen(Request(url, json.dumps(content).encode(), {{"Content-Type": "application/json"}}))
rate = 1000 if options["-u"] == "{peer}" else 2000
if rate == 1000 and "--input-tensor-format" in options:
    sys.exit()
with open(options["-f"], "w") as file:
    file.write(f"Inferences/Second,p50 latency,p99 latency\\n{{rate}},800,2000\\n")
"""
"""Stands for `perf_analyzer`, which is not among the dependencies: four requests, made-up rates."""


def test_peer_is_compared_over_http_although_grpc_fails(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "IN_FLIGHT", (1,))
    with bench.scope:
        address = f"127.0.0.1:{bench.start_server(CARRY).port}"
        tool = tmp_path / peer.TOOL
        failures = tmp_path / "failures"
        tool.write_text(TOOL.format(python=sys.executable, peer=address, failures=failures))
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        bench.options.peer, bench.options.peer_grpc = address, address
        sections.run_section(bench, "peer")
    results = bench.results
    # a run without a report is no second one of the run before it
    assert "peer/json 1/peer" not in results.rows
    assert any("peer/json 1/peer: not every round was stable" in each for each in results.notes)
    assert results.figures[f"peer/http 1: {CARRY} over peer"] == (2, 2, 2)
    assert results.rows[f"peer/http 1/{CARRY}"][0].p50_ms == 0.8
    assert all(row[0].cpu_us_per_chunk > 0 for row in results.rows.values())
    noted = [note.partition(" FAILED")[0] for note in results.notes if "FAILED" in note]
    assert noted == [f"peer/grpc 1/{CARRY}", "peer/grpc 1/peer"]
    assert len(failures.read_text().splitlines()) == 2


def test_peer_is_skipped_where_none_is_named(bench: Bench) -> None:
    sections.run_section(bench, "peer")
    assert "no server is named by --peer" in bench.results.notes[0]
