"""The CPU time of a chunk by stage: py-spy's samples of a server, sorted by rules.

A sample is a stack of a thread that runs or waits for the processor. Going from its innermost
frame outwards, the first frame that a rule matches gives the stage; so what a library does on
the store's behalf counts for the store; what the event loop does by itself, the reading and
writing of sockets above all, counts for HTTP.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.machine import pin_child

STAGES = ("HTTP", "codec", "queue", "load", "infer", "commit", "other")
RATE_HZ = 400
ATTACH_S = 30.0

RULES = tuple(
    (stage, re.compile(pattern))
    for stage, pattern in (
        # a pattern over `function (path/file.py:line)`
        ("codec", r"\(service/transports/http/(wire|bodies|long_bodies|replies|media)\b"),
        ("codec", r"\(models/events/"),
        ("codec", r"\b\w*(digest|encode|encoded)\w* \(service/(core|pipeline)"),
        ("load", r"\b_?(load|evaluate|decode)\w* \(service/"),
        ("commit", r"\b_?(commit|apply_chunk|encode_state|encode_reply|next_tag)\w* \(service/"),
        ("infer", r"\(service/engine/(compute|runtimes)"),
        ("infer", r"\b_?(infer|step)\w* \(service/"),
        ("infer", r"\((onnxruntime|tensorflow|keras|concurrent/futures)/"),
        ("HTTP", r"\((service/ops/(logs|request_log)|structlog/)"),
        ("queue", r"\(service/(engine|pipeline|ops|core)"),
        ("load", r"\b_?(read)\w* \(service/store/"),
        ("commit", r"\(service/store/"),
        ("HTTP", r"\((service/(transports|server)|uvicorn|starlette|fastapi|httptools)"),
        ("HTTP", r"\b(run|serve|run_forever|run_until_complete) \((uvicorn|asyncio|uvloop)"),
    )
)
WAITING = re.compile(r"(_worker \(concurrent/futures/thread|\bwait \(threading)\.py:\d+\)$")
"""The innermost frame of a thread that waits for work: it takes no processor time, and not every
machine lets py-spy see that."""


class CannotProfileError(Exception):
    """py-spy is missing, or may not look into the server."""


def record_stacks(pid: int, seconds: int, cores: Sequence[int]) -> Counter[str]:
    """The stacks of a process over some seconds; call it while the server is loaded.

    Raises:
        CannotProfileError
    """
    profiler = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if profiler is None:
        raise CannotProfileError("py-spy is not installed")
    with tempfile.NamedTemporaryFile(prefix="carry-bench-") as stacks:
        command = [profiler, "record", "--format", "raw", "--nonblocking", "--rate", str(RATE_HZ)]
        command += ["--duration", str(seconds), "--pid", str(pid), "--output", stacks.name]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds + ATTACH_S,
            preexec_fn=pin_child(cores),
        )
        text = Path(stacks.name).read_text()
    if not text:
        reasons = done.stderr.strip().splitlines()
        raise CannotProfileError(f"py-spy cannot look into the server: {reasons[-1:]}")
    return read_stacks(text)


def read_stacks(text: str) -> Counter[str]:
    """The collapsed stacks of a recording, with their counts; without threads that wait."""
    stacks: Counter[str] = Counter()
    for line in text.splitlines():
        stack, _, count = line.rpartition(" ")
        if not WAITING.search(stack):
            stacks[stack] += int(count)
    return stacks


def stage_of(stack: str) -> str:
    """The stage of one stack, whose frames are separated by semicolons, outermost first."""
    for frame in reversed(stack.split(";")):
        for stage, pattern in RULES:
            if pattern.search(frame):
                return stage
    return "other"


def stage_shares(stacks: Mapping[str, int]) -> dict[str, float]:
    """Each stage's share of the samples, 0 to 1, in the order of `STAGES`."""
    counts: Counter[str] = Counter()
    for stack, count in stacks.items():
        counts[stage_of(stack)] += count
    return {stage: counts[stage] / max(1, counts.total()) for stage in STAGES}
