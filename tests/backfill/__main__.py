"""Backfills of synthetic histories: how large a run is, and what interruptions change.

    python -m tests.backfill size --events 50000000 --streams 200000
    python -m tests.backfill kills
    python -m tests.backfill rates
    python -m tests.backfill plan --events 1e11 --machines 32

`size` runs `carry backfill` over a history, and prints its time, memory and disk. `kills` (`make
backfill-faults`) interrupts runs at random moments, and compares their bytes with those of an
undisturbed one. `rates` measures one core, and `plan` computes from that what a cluster takes.
Folders are kept with `--folder`. Exits with 1 if a run fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.pretrained.departures import flight_events
from service.backfill.engines import ONE_THREAD
from tests.backfill import plan
from tests.backfill.histories import History, write_model
from tests.backfill.kills import interrupt_runs
from tests.backfill.runs import Run
from tests.backfill.size import measure
from tests.support.machine import describe_run
from tests.support.models import PRETRAINED


def main(arguments: Sequence[str]) -> int:
    """Run one of the commands."""
    if arguments[:1] == ["plan"]:
        plan.main(arguments[1:])
        return 0
    if arguments[:1] == ["rates"]:
        # polars reads the number of its threads once
        command = [sys.executable, "-m", "tests.backfill.rates"]
        return subprocess.run(command, env={**os.environ, **ONE_THREAD}, check=False).returncode
    parser = argparse.ArgumentParser(
        prog="python -m tests.backfill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    size = commands.add_parser("size", help="measure one run")
    size.set_defaults(run=_measure)
    kills = commands.add_parser("kills", help="interrupt runs")
    kills.set_defaults(run=_interrupt)
    for each, events, streams, bad in (
        (size, 50_000_000, 200_000, 0.0),
        (kills, 400_000, 4_000, 0.001),
    ):
        add = each.add_argument
        add("--events", type=int, default=events, help=f"({events:,})")
        add("--streams", type=int, default=streams, help=f"({streams:,})")
        add("--bad", type=float, default=bad, help=f"share of unreadable rows ({bad})")
        add("--skew", type=float, default=0.0, help="share of the events in one stream (0)")
        add("--files", type=int, default=25, help="of the history (25)")
        add("--kind", choices=("parquet", "csv"), default="parquet", help="of the files (parquet)")
        add("--seed", type=int, default=1, help="(1)")
        add("--units", type=int, default=64, help="of each LSTM of the model (64)")
        add("--folder", type=Path, help="keeps the history, the model and the results here")
    size.add_argument("--flights", action="store_true", help="measure all flights instead")
    size.add_argument("words", nargs="*", help="options of `carry backfill`, after `--`")
    kills.add_argument("--kills", type=int, default=20, help="interruptions of each run (20)")
    kills.add_argument("--no-ray", action="store_true", help="leave the engine `ray` out")
    chosen = parser.parse_args(arguments)
    print(*(f"{name}: {value}" for name, value in describe_run().items()), sep="\n", flush=True)
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="carry-backfill-"))
    try:
        return int(chosen.run(chosen, folder))
    finally:
        if chosen.folder is None:
            shutil.rmtree(folder)


def _write(chosen: argparse.Namespace, folder: Path, **more: Any) -> tuple[Path, Path]:
    """Write the model and the history, unless they are there."""
    history = History(
        events=chosen.events,
        streams=chosen.streams,
        files=chosen.files,
        skew=chosen.skew,
        bad=chosen.bad,
        seed=chosen.seed,
        **more,
    )
    model, data = folder / "machines", folder / f"history-{chosen.kind}-{chosen.events}"
    if chosen.skew:
        data = data.with_name(f"{data.name}-skew")
    if not (model / "manifest.json").exists():
        write_model(model, chosen.units)
    if not data.exists():
        unfinished = data.with_name(f".{data.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        history.write(unfinished, chosen.kind)
        unfinished.rename(data)
    return model, data


def _measure(chosen: argparse.Namespace, folder: Path) -> int:
    model, data = _write_flights(folder) if chosen.flights else _write(chosen, folder)
    size_mib = sum(path.stat().st_size for path in data.iterdir()) / 2**20
    print(f"history: {data.name}, {size_mib:,.0f} MiB", flush=True)
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    run = Run(model, data, out, chosen.words)
    run.log.unlink(missing_ok=True)
    print(*measure(run).lines(), sep="\n")
    whole = json.dumps(run.digests(), sort_keys=True)
    print(f"digest of all results: {hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()}")
    return 0


def _write_flights(folder: Path) -> tuple[Path, Path]:
    """The pretrained model, and the events that it was trained and tested on."""
    data = folder / "flights"
    data.mkdir(exist_ok=True)
    flight_events().write_parquet(data / "flights.parquet")
    return PRETRAINED / "flights", data


def _interrupt(chosen: argparse.Namespace, folder: Path) -> int:
    model, data = _write(chosen, folder, duplicates=0.001)
    problems = interrupt_runs(
        *(model, data, folder), kills=chosen.kills, seed=chosen.seed, ray=not chosen.no_ray
    )
    print(*(["FAILED", *problems] if problems else ["passed"]), sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
