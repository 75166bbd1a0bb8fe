"""The CPU of a chunk, by stage: HTTP, codec, queue, load, infer, commit."""

from __future__ import annotations

import math
from collections import Counter

from tests.bench.context import Bench
from tests.bench.cpu_split import CannotProfileError, Profile, shares, stage_of

SHOWN = 12


def run(bench: Bench) -> None:
    """For each runtime: the CPU per chunk in peace, then the shares under the profiler."""
    for kind in bench.carry_kinds():
        with (
            bench.store() as store,
            bench.drivers() as [driver],
            bench.server(kind, store) as server,
        ):
            bench.ready(driver, kind, server, bench.bodies)
            for _ in range(bench.options.rounds):
                bench.closed(f"split/32/{kind}", driver, kind, server, store)
            seconds = math.ceil(bench.options.seconds * 2)
            driver.begin("closed", kind, server.port, 32, seconds + 1.0)
            try:
                profile = Profile(server.pid, seconds, bench.cores.others)
                profile.record()
            except CannotProfileError as error:
                bench.note(f"the CPU of {kind} is not split: {error}")
                continue
            finally:
                driver.finish()
        cpu_us = bench.results.rows[f"split/32/{kind}"].median("cpu_us_per_chunk")
        for stage, share in shares(profile.stacks).items():
            bench.results.figure(f"split/{kind} {stage}, us a chunk", [share * cpu_us])
        _show(bench, profile)


def _show(bench: Bench, profile: Profile) -> None:
    """The innermost frames that cost most, as a hint at where to look."""
    total = max(1, profile.stacks.total())
    inner: Counter[tuple[str, str]] = Counter()
    for stack, count in profile.stacks.items():
        inner[stage_of(stack), stack.rpartition(";")[2]] += count
    for (stage, frame), count in inner.most_common(SHOWN):
        bench.say(f"  {count / total:6.1%}  {stage:7} {frame}")
