"""The command `carry backfill`: what it prints, its dry run, and its end by signals."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import polars as pl

from models.artifact.artifact import Artifact
from models.spec.model import schema_of
from tests.support.backfill import (
    EVENTS,
)
from tests.support.command import carry
from tests.support.forks import COMMAND, Fork
from tests.support.servers import until

STARTING = """
import os, signal, sys, threading, time
from multiprocessing.popen_spawn_posix import Popen
from pathlib import Path

folder = Path(os.environ["PYTHONPATH"])
if "--multiprocessing-fork" in sys.orig_argv:
    blocked = sorted(each.name for each in signal.pthread_sigmask(signal.SIG_BLOCK, []))
    (folder / "blocked").write_text(" ".join(["blocked:", *blocked]))
    time.sleep(3600)
else:
    launch = Popen._launch

    def launch_and_wait(*arguments):
        launch(*arguments)
        while not (folder / "sent").exists():
            time.sleep(0.01)

    Popen._launch = launch_and_wait
    threading.Thread(target=time.sleep, args=[3600], daemon=True).start()
"""
"""A `sitecustomize` by which the processes of a backfill start forever, and the command waits for a
signal before it notes them. Another of its threads may receive it, as those of Polars."""


def test_the_command_reports_what_it_did(
    artifact: Artifact, frame: pl.DataFrame, tmp_path: Path
) -> None:
    field = next(each.name for each in schema_of(artifact.spec).fields if each.kind == "numeric")
    row = pl.int_range(pl.len()) == 7
    values = pl.col(field).cast(pl.String)
    frame.with_columns(pl.when(row).then(pl.lit("much")).otherwise(values).alias(field)).write_csv(
        tmp_path / "a.csv"
    )
    files = [artifact.path, tmp_path / "a.csv", tmp_path / "out"]
    result = carry("backfill", *files, "--stream", "stream", "--workers", "1")
    assert result.exit_code == 0, result.stderr
    printed = result.stdout.decode()
    assert f"{EVENTS - 1} events of 9 streams" in printed
    assert f"rejected 1: {field}: " in printed
    assert "a.csv, row 8" in printed
    assert (tmp_path / "out" / "throughput.png").read_bytes().startswith(b"\x89PNG")
    again = carry("backfill", *files, "--stream", "stream")
    assert again.exit_code == 0, again.stderr
    files[1].write_text("stream\n")
    changed = carry("backfill", *files, "--stream", "stream")
    assert changed.exit_code == 1
    assert "a.csv: was changed since its rows were read" in changed.stderr


def test_a_history_without_a_readable_event_is_an_error(
    artifact: Artifact, frame: pl.DataFrame, tmp_path: Path
) -> None:
    frame.with_columns(stream=pl.lit("")).write_csv(tmp_path / "a.csv")
    words = [artifact.path, tmp_path / "a.csv", tmp_path / "out", "--stream", "stream"]
    for _ in range(2):
        result = carry("backfill", *words, "--workers", "1")
        assert result.exit_code == 1
        assert f"rejected {EVENTS}: stream: " in result.stdout.decode()
        assert "every event was rejected" in result.stderr
    frame.write_csv(tmp_path / "a.csv")
    assert carry("backfill", *words, "--workers", "1", "--overwrite").exit_code == 0


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    artifact: Artifact, history: list[Path], tmp_path: Path
) -> None:
    words = [artifact.path, *history, tmp_path / "out", "--stream", "stream", "--workers", "3"]
    result = carry("backfill", *words, "--dry-run")
    assert result.exit_code == 0, result.stderr
    first, *_ = lines = result.stdout.decode().splitlines()
    assert re.fullmatch(r"would compute about \d+ events in 1 buckets, by 3 processes", first)
    assert [line.partition(" ")[0] for line in lines[1:]] == ["about", "disk:", "memory:"]
    assert not (tmp_path / "out").exists()


def test_signals_end_the_command_cleanly(
    artifact: Artifact, frame: pl.DataFrame, tmp_path: Path
) -> None:
    """A terminal sends one to all processes; one that is starting prints nothing about it."""
    frame.write_csv(tmp_path / "b.csv")
    words = [*map(str, (artifact.path, tmp_path / "b.csv", tmp_path / "out")), "--stream", "stream"]
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / number.name
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(STARTING)
        blocked = folder / "blocked"
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        with (folder / "printed").open("wb") as log:
            command = [COMMAND, "backfill", *words, "--workers", "1"]
            fork = Fork(command, environment, [log, log, log])
        try:
            until(blocked.exists, "a process that starts")
            assert until(blocked.read_text) == "blocked: SIGINT SIGTERM"
            os.killpg(fork.pid, number)
            (folder / "sent").touch()
            assert fork.wait(60) == 128 + number
        finally:
            with suppress(ProcessLookupError):
                os.killpg(fork.pid, signal.SIGKILL)
        printed = (folder / "printed").read_text()
        assert printed == "interrupted: the same command goes on\n"
