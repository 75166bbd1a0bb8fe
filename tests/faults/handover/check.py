"""Checks every stream of a run: the outputs of its history and of its live events together are
those of the sequential run over all of them, in whole numbers, none missing, none twice."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tests.faults.handover.layout import OUTPUT_COLUMNS
from tests.faults.network import OUTPUT, ZERO, compute
from tests.faults.topics.check import read_entries
from tests.faults.topics.layout import Events

Output = tuple[int, NDArray[np.float32]]
"""Position and values."""


def read_outputs(client: Any, topics: list[str]) -> dict[str, list[Output]]:
    """The outputs in topics, by stream, in their order."""
    outputs: dict[str, list[Output]] = defaultdict(list)
    for topic in topics:
        for _, fields in read_entries(client, topic):
            values = np.array(json.loads(fields[b"outputs"])[OUTPUT], np.float32)
            outputs[fields[b"stream"].decode()].append((int(fields[b"position"]), values))
    return outputs


def read_history_outputs(out: Path) -> dict[str, list[Output]]:
    """The outputs that a backfill has written, by stream, in their order."""
    outputs: dict[str, list[Output]] = {}
    for file in sorted((out / "outputs").glob("*.parquet")):
        table = pl.read_parquet(file)
        values = table.select(OUTPUT_COLUMNS).to_numpy()
        rows = zip(table["stream"].to_list(), table["position"].to_list(), values, strict=True)
        for stream, position, row in rows:
            outputs.setdefault(stream, []).append((position, row))
    return outputs


def check_outputs(
    events: Events,
    history: Mapping[str, int],
    ends: Mapping[str, int],
    backfilled: Mapping[str, list[Output]],
    live: Mapping[str, list[Output]],
    seen: Counter[str],
) -> list[str]:
    """What is wrong; counts what was checked in `seen`.

    Args:
        history: recorded events of each stream that has a history.
        ends: events of each stream.
        backfilled, live: outputs of the history, and of the events that were sent; of a stream that
            lived before its history was loaded, all are live.
    """
    findings = [
        f"{stream}: outputs of a stream without events"
        for stream in {*backfilled, *live} - ends.keys()
    ]
    for stream, end in ends.items():
        count = history.get(stream, 0)
        outputs = compute(ZERO, events.read(stream, 0, max(end, count)))
        start = 0 if stream[0] == "w" else count
        parts = (
            ("history", backfilled.get(stream, []), 0, count),
            ("live", live.get(stream, []), start, end),
        )
        for name, part, first, last in parts:
            findings += _check_part(f"{stream}, {name}", part, first, outputs[first:last])
            seen[f"outputs of {name} events checked"] += last - first
    seen["streams"] = len(ends)
    return findings


def _check_part(
    name: str, outputs: list[Output], first: int, expected: NDArray[np.int64]
) -> Iterator[str]:
    last = first + len(expected)
    for at, (position, _) in enumerate(outputs):
        if position != first + at:
            kind = "doubled, or out of order" if position < first + at else "lost"
            yield f"{name}: {kind}: expected position {first + at} of {last}, got {position}"
            return
    if len(outputs) != len(expected):
        kind = "lost" if len(outputs) < len(expected) else "doubled"
        yield f"{name}: {kind}: outputs end at {first + len(outputs)}, expected {last}"
        return
    values = np.array([each for _, each in outputs], np.float32).reshape(expected.shape)
    if (differing := np.flatnonzero((values != expected).any(axis=1))).size:
        yield f"{name}: other outputs than the sequential run at position {first + differing[0]}"
