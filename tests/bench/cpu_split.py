"""Where a chunk's processor time goes: py-spy's samples of a server, sorted by stage.

A sample is a stack of a thread that runs or waits for the processor. Going from its innermost
frame outwards, the first frame that a rule knows gives the stage; so what a library does on
the store's behalf counts for the store; what the event loop does by itself, the reading and
writing of sockets above all, counts for HTTP. The shares are multiplied with the CPU per chunk
that was measured without the profiler.
"""

from __future__ import annotations

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

RULES: tuple[tuple[str, str], ...] = (
    # stage, and a pattern over `function (path/file.py:line)`
    ("codec", r"\(service/transports/http/(wire|bodies|plain|media|invalid)\b"),
    ("codec", r"\(models/events/"),
    ("codec", r"\b\w*(digest|encode|encoded)\w* \(service/(delivery|served|infer)"),
    ("load", r"\b_?(load|evaluate|decode)\w* \(service/"),
    ("commit", r"\b_?(commit|apply_chunk|encode_state|encode_reply|next_tag)\w* \(service/"),
    ("infer", r"\(service/engine/(compute|\w*runtime)"),
    ("infer", r"\b_?(infer|step)\w* \(service/"),
    ("infer", r"\((onnxruntime|tensorflow|keras|concurrent/futures)/"),
    ("HTTP", r"\((service/ops/(logs|request_log)|structlog/)"),
    ("queue", r"\(service/(engine|pipeline|batch|infer|member|ops|recorder|delivery|domain)"),
    ("commit", r"\b_?(run|write\w*) \(service/store/"),
    ("load", r"\b_?(read)\w* \(service/store/"),
    ("commit", r"\(service/store/"),
    ("HTTP", r"\((service/(api|serve)|uvicorn|starlette|fastapi|httptools)"),
    ("HTTP", r"\b(run|serve|run_forever|run_until_complete) \((uvicorn|asyncio|uvloop)"),
)
_WAITING = re.compile(r"(_worker \(concurrent/futures/thread|\bwait \(threading)\.py:\d+\)$")
"""The innermost frame of a thread that waits for work: it takes no processor time, and not every
machine lets py-spy see that."""
_COMPILED = tuple((stage, re.compile(pattern)) for stage, pattern in RULES)


class CannotProfileError(Exception):
    """py-spy is missing, or may not look into the server."""


def profiler() -> str | None:
    """The path of py-spy, next to this Python or on the PATH."""
    beside = Path(sys.executable).parent / "py-spy"
    return str(beside) if beside.exists() else shutil.which("py-spy")


class Profile:
    """One recording of a server, under way while the block runs."""

    def __init__(self, pid: int, seconds: int, cores: Sequence[int]):
        self._pid, self._seconds, self._cores = pid, seconds, cores
        self.stacks: Counter[str] = Counter()

    def record(self) -> None:
        """Record for the whole time; call it while the server is loaded.

        Raises:
            CannotProfileError
        """
        found = profiler()
        if found is None:
            raise CannotProfileError("py-spy is not installed")
        with tempfile.TemporaryDirectory(prefix="carry-bench-") as folder:
            out = Path(folder) / "stacks"
            done = subprocess.run(
                [
                    *(found, "record", "--format", "raw", "--nonblocking", "--rate", str(RATE_HZ)),
                    *("--duration", str(self._seconds), "--pid", str(self._pid)),
                    *("--output", str(out)),
                ],
                capture_output=True,
                text=True,
                check=False,
                timeout=self._seconds + ATTACH_S,
                preexec_fn=pin_child(self._cores),
            )
            if not out.exists():
                last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise CannotProfileError(f"py-spy cannot look into the server: {last}")
            self.stacks = read_stacks(out.read_text())


def read_stacks(text: str) -> Counter[str]:
    """The collapsed stacks of a recording, with their counts; without threads that wait."""
    stacks: Counter[str] = Counter()
    for line in text.splitlines():
        stack, _, count = line.rpartition(" ")
        if not _WAITING.search(stack):
            stacks[stack] += int(count)
    return stacks


def stage_of(stack: str) -> str:
    """The stage of one stack, whose frames are separated by semicolons, outermost first."""
    for frame in reversed(stack.split(";")):
        for stage, pattern in _COMPILED:
            if pattern.search(frame):
                return stage
    return "other"


def shares(stacks: Mapping[str, int]) -> dict[str, float]:
    """Each stage's share of the samples, 0 to 1, in the order of `STAGES`."""
    counts: Counter[str] = Counter()
    for stack, count in stacks.items():
        counts[stage_of(stack)] += count
    total = max(1, counts.total())
    return {stage: counts[stage] / total for stage in STAGES}
