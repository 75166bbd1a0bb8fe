"""Checks the output topics against the topics of events, by whole-number arithmetic.

What the topics hold is what was produced: of a stream with positions each event once, in order; of
another every entry. The output topics must hold exactly the outputs of the sequential run over
these events, one for each, in order, in one epoch, with the tags that follow from them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby, zip_longest
from typing import Any, Final

import numpy as np

from tests.faults.history import FIRST_TAG, Chunk, next_tag
from tests.faults.network import OUTPUT, ZERO, Rows, compute
from tests.faults.topics.layout import GROUP, PARTITIONS, has_positions, topic

PAGE: Final = 5_000
SHOWN: Final = 12

Output = tuple[int, str, str, list[float]]
"""Position, epoch, tag and values."""


def check_topics(client: Any, seen: dict[str, int]) -> list[str]:
    """What is wrong in all topics; counts what was checked in `seen`."""
    findings = []
    for partition in range(PARTITIONS):
        events, duplicates = _read_events(client, partition)
        outputs = _read_outputs(client, partition)
        findings += [f"an output of stream {name}" for name in outputs.keys() - events.keys()]
        for stream, rows in events.items():
            findings += _check_stream(stream, np.array(rows, np.int8), outputs[stream])
            seen["outputs checked"] += len(outputs[stream])
            seen["streams"] += 1
        seen["duplicates in the topics"] += duplicates
        for entry_id, fields in client.xrange(topic(partition, "dead"), count=SHOWN):
            findings.append(f"a dead letter {entry_id!r}: {fields}")
        findings += _check_group(client, topic(partition))
    return findings


def _check_group(client: Any, name: str) -> list[str]:
    groups = client.xinfo_groups(name) if client.exists(name) else []
    pending = sum(each["pending"] for each in groups if each["name"] == GROUP.encode())
    return [f"{name}: {pending} entries are pending"] if pending else []


def _read_events(client: Any, partition: int) -> tuple[dict[str, list[list[int]]], int]:
    """The events of each stream, and how many duplicates there were."""
    events: dict[str, list[list[int]]] = defaultdict(list)
    duplicates = 0
    for _, fields in _read(client, topic(partition)):
        stream = fields[b"stream"].decode()
        rows = events[stream]
        if has_positions(stream):
            position = int(fields[b"position"])
            if position < len(rows):
                duplicates += 1
                continue
            if position > len(rows):
                raise AssertionError(f"{stream}: the producer left out {len(rows)} to {position}")
        rows.append(json.loads(fields[b"event"]))
    return events, duplicates


def _read_outputs(client: Any, partition: int) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = defaultdict(list)
    for _, fields in _read(client, topic(partition, "out")):
        head = int(fields[b"position"]), fields[b"epoch"].decode(), fields[b"tag"].decode()
        values = json.loads(fields[b"outputs"])[OUTPUT]
        outputs[fields[b"stream"].decode()].append((*head, values))
    return outputs


def _read(client: Any, name: str) -> Iterator[tuple[bytes, dict[bytes, bytes]]]:
    after = "-"
    while entries := client.xrange(name, after, "+", PAGE):
        yield from entries
        after = f"({entries[-1][0].decode()}"


def _check_stream(stream: str, rows: Rows, outputs: list[Output]) -> Iterator[str]:
    expected = compute(ZERO, rows)
    for position, (values, output) in enumerate(zip_longest(expected, outputs)):
        if output is None:
            yield f"{stream}: lost from position {position} on, of {len(rows)} events"
            return
        if values is None:
            yield f"{stream}: {len(outputs) - position} outputs too many, {output[:3]}"
            return
        if output[0] != position:
            kind = "doubled, or out of order" if output[0] < position else "lost"
            yield f"{stream}: {kind}: expected position {position}, got {output[0]}"
            return
        if not np.array_equal(np.asarray(output[3]).ravel(), values):
            yield f"{stream}: other outputs than the sequential run at position {position}"
            return
    epochs = list(dict.fromkeys(epoch for _, epoch, *_ in outputs))
    if len(epochs) > 1:
        yield f"{stream}: outputs of the epochs {epochs}"
    if has_positions(stream):
        yield from _check_tags(stream, rows, outputs)


def _check_tags(stream: str, rows: Rows, outputs: list[Output]) -> Iterator[str]:
    tag, start = FIRST_TAG, 0
    for stored, group in groupby(outputs, lambda output: output[2]):
        end = start + len(list(group))
        tag = next_tag(tag, start, Chunk(stream, start, rows[start:end]).digest)
        if tag.hex() != stored:
            yield f"{stream}: the tag at position {end} does not follow from its events"
            return
        start = end
