"""A run that is interrupted, or made in another way, has the bytes of an undisturbed one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.backfill.command import BUGS
from tests.backfill.histories import History, write_model
from tests.backfill.kills import (
    ALL,
    RAY_WORKER,
    WORKER,
    Disturbed,
    check_run,
    kill_all,
    run_disturbed,
)
from tests.backfill.runs import Run
from tests.support.servers import until

HISTORY = History(events=20_000, streams=400, files=3, bad=0.01, duplicates=0.01)
SIZES = {"unit_rows": 1_000, "piece_rows": 1_500, "buckets": 4}
STEPS = 3 * 7 + 4
LIMIT = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Runs a command with a limit on the size of its files, in bytes."""

# each start of a command imports for seconds on a busy machine
pytestmark = pytest.mark.timeout(900)


@dataclass(frozen=True)
class Whole:
    """An undisturbed run, and the digests of its files."""

    run: Run
    digests: dict[str, str]

    def other(self, out: Path, *options: str, **changes: Any) -> Run:
        """A run of the same history into another folder."""
        return replace(self.run, out=out, options=options, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("backfill")
    write_model(folder / "machines", units=8)
    HISTORY.write(folder / "history")
    places = folder / "machines", folder / "history", folder / "whole"
    run = Run(*places, ("--workers", "1"), SIZES)
    assert run.finish() == 0, run.printed()
    assert run.count_buckets() == SIZES["buckets"]
    assert len(run.digests()) >= 2 * SIZES["buckets"]
    return Whole(run, run.digests())


def disturb(run: Run, whole: Whole, kinds: Sequence[str], seed: int = 1) -> list[str]:
    """What is wrong with a run after interruptions."""
    seen = run_disturbed(run, kinds, STEPS, seed)
    assert not seen.failures
    return check_run(run, whole.digests, seen)


def test_killed_run_goes_on_with_the_same_bytes(whole: Whole, tmp_path: Path) -> None:
    run = whole.other(tmp_path / "killed", "--workers", "2")
    assert disturb(run, whole, [WORKER, ALL]) == []


@pytest.mark.harness  # as a whole command; each engine is tested in `tests.service.backfill`
@pytest.mark.parametrize("options", [("--workers", "3"), ("--engine", "ray", "--workers", "2")])
def test_bytes_do_not_depend_on_engine_or_workers(
    whole: Whole, tmp_path: Path, options: tuple[str, ...]
) -> None:
    if "ray" in options and find_spec("ray") is None:
        pytest.skip("ray is not installed")
    kinds = [RAY_WORKER] if "ray" in options else []
    assert disturb(whole.other(tmp_path / "other", *options), whole, kinds) == []


def test_run_whose_disk_is_full_names_the_file_and_goes_on(whole: Whole, tmp_path: Path) -> None:
    run, finished = whole.other(tmp_path / "full", "--workers", "1"), {}
    for size_bytes, file in ((10_000, "shuffle/unit-"), (60_000, "outputs/bucket-")):
        limited = replace(run, prefix=(sys.executable, "-c", LIMIT, str(size_bytes)))
        assert limited.finish() == 1
        assert "Traceback" not in run.printed()
        assert f"File too large: '{run.out}/{file}" in run.printed()
        assert run.computed_again(finished) == []
        finished = run.finished()
    assert len(finished) == STEPS - SIZES["buckets"]
    assert run.finish() == 0, run.printed()
    assert run.computed_again(finished) == []
    assert run.digests() == whole.digests
    assert run.leftovers() == []


@pytest.mark.harness
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_detected(whole: Whole, tmp_path: Path, bug: str) -> None:
    run = whole.other(tmp_path / "planted", bug=bug)
    process = run.start()
    until(lambda: process.poll() is not None or run.count_buckets(), "a bucket", 240)
    kill_all(process)
    finished = run.finished()
    assert run.finish() == 0, run.printed()
    seen = Disturbed(again=run.computed_again(finished))
    assert check_run(run, whole.digests, seen) != []
