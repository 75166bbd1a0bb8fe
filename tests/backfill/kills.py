"""Interrupts `carry backfill` at random moments and starts it again, until it is done.

An interruption comes once a drawn number of units and buckets are finished, so that it hits every
part of a run on any machine. What was finished before one must be the same files afterwards, by
inode and time of writing: nothing is computed twice but what was open. The bytes of all results
must be those of an undisturbed run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import psutil

from tests.backfill.runs import SMALL, Run

POLL_S: Final = 0.002
LONGEST_POLLS: Final = 100
"""An interruption follows its condition by up to so many polls."""
MOST_RUNS = 4
"""Runs of a case whose interruptions come too late in the first."""

STARTS: Final = 100
"""A run that needs more starts makes no progress."""

ALL, WORKER, RAY_WORKER = "all processes killed", "a worker killed", "a Ray worker killed"
_NO_WORKERS: Final = ("resource_tracker", "forkserver")


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill every process of a command at once, those included that left its session."""
    descendants: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for each in descendants:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(descendants)
    process.wait()


def kill_worker(process: subprocess.Popen[bytes], random: np.random.Generator, kind: str) -> bool:
    """Kill one process that computes; returns whether there was one."""
    try:
        descendants = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return False
    workers = [each for each in descendants if _is_worker(each, kind)]
    if not workers:
        return False
    with suppress(psutil.NoSuchProcess):
        workers[int(random.integers(len(workers)))].kill()
    return True


def _is_worker(process: psutil.Process, kind: str) -> bool:
    try:
        words = " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    if kind == RAY_WORKER:
        # a node ends with its agents, which have such names too
        return words.startswith("ray::run_task")
    return "multiprocessing" in words and not any(each in words for each in _NO_WORKERS)


@dataclass
class Disturbed:
    """What a disturbed run saw.

    Attributes:
        interruptions: how many of each kind.
        starts: of the command.
        again: units and buckets that were computed again although they were finished.
        failures: what was printed by starts that failed without being killed.
    """

    interruptions: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    again: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def run_disturbed(
    run: Run, kinds: Sequence[str], steps: int, seed: int, say: Callable[[str], None] = print
) -> Disturbed:
    """Run a backfill to its end, with one interruption of each of `kinds`, in turn.

    Args:
        steps: units and buckets of the whole run.

    Raises:
        AssertionError: it makes no progress.
    """
    random, seen, waiting = np.random.default_rng(seed), Disturbed(), list(kinds)
    while True:
        assert seen.starts < STARTS, f"not done after {STARTS} starts: {run.printed()}"
        before, process = [run.finished()], run.start()
        seen.starts += 1
        while waiting and process.poll() is None:
            # the later ones are left some steps
            most = max(0, (steps - 1 - run.count_finished()) // len(waiting))
            if not _wait(process, run, run.count_finished() + int(random.integers(most + 1))):
                break
            time.sleep(POLL_S * float(random.uniform(0, LONGEST_POLLS)))
            if process.poll() is not None:
                break
            if waiting[0] == ALL:
                kill_all(process)
            elif not kill_worker(process, random, waiting[0]):
                continue
            kind = waiting.pop(0)
            seen.interruptions[kind] += 1
            before.append(run.finished())
            say(f"  {kind} after {run.count_finished()} of {steps} steps")
        status = process.wait()
        for each in before:
            seen.again += run.computed_again(each)
        if status == 0:
            return seen
        assert status < 0 or len(before) > 1, f"exit status {status}: {run.printed()}"
        if status > 0:
            seen.failures.append(run.printed())


def _wait(process: subprocess.Popen[bytes], run: Run, steps: int) -> bool:
    """Wait until so many steps are finished; returns whether the process runs still."""
    while process.poll() is None and run.count_finished() < steps:
        time.sleep(POLL_S)
    return process.poll() is None


def differences(expected: Mapping[str, str], got: Mapping[str, str]) -> list[str]:
    """How the files of one run differ from those of another."""
    missing = [f"{name} is missing" for name in sorted(expected.keys() - got.keys())]
    further = [f"{name} is no result of an undisturbed run" for name in got.keys() - expected]
    same = expected.keys() & got.keys()
    return (
        missing + further + [f"{name}: other bytes" for name in same if expected[name] != got[name]]
    )


def check_run(run: Run, expected: Mapping[str, str], seen: Disturbed) -> list[str]:
    """What is wrong with a run that was disturbed."""
    again = [f"{name} was computed again" for name in seen.again]
    leftovers = [f"{name} was left" for name in run.leftovers()]
    return differences(expected, run.digests()) + again + leftovers


def interrupt_runs(
    artifact: Path, history: Path, folder: Path, *, kills: int, seed: int, ray: bool
) -> list[str]:
    """Run a history undisturbed, with interruptions, and in other ways; returns what is wrong."""
    whole = Run(artifact, history, folder / "whole", ("--workers", "2"), SMALL)
    most, counted = 0, whole.start()
    while counted.poll() is None:
        most = max(most, whole.count_finished())
        time.sleep(POLL_S)
    if counted.returncode:
        return [f"the undisturbed run failed: {whole.printed()}"]
    expected, problems = whole.digests(), []
    print(f"undisturbed: {most} steps, {len(expected)} files", flush=True)
    workers = max(1, kills // 5)
    killed = [*[ALL] * (kills - workers), *[WORKER] * workers]
    kinds = np.random.default_rng(seed).permutation(killed).tolist()
    cases: list[tuple[str, Sequence[str], Sequence[str]]] = [
        ("killed", ("--workers", "2"), kinds),
        ("one worker", ("--workers", "1"), ()),
        ("three workers", ("--workers", "3"), ()),
    ]
    if ray:
        cases.append(("ray", ("--engine", "ray", "--workers", "2"), [RAY_WORKER] * 3))
    for name, options, these in cases:
        waiting = list(these)
        for number in range(MOST_RUNS):
            out = folder / f"{name.replace(' ', '-')}-{number}"
            run = Run(artifact, history, out, options, SMALL)
            print(f"{name}:", flush=True)
            seen = run_disturbed(run, waiting, most, seed + number)
            found = check_run(run, expected, seen)
            print(
                f"  {seen.starts} starts, {len(seen.failures)} failed, {len(found)} problems",
                flush=True,
            )
            problems += [f"{name}: {each}" for each in found]
            waiting = waiting[seen.interruptions.total() :]
            if not waiting:
                break
        else:
            problems.append(f"{name}: {len(waiting)} interruptions came too late")
    return problems
