"""Checks the output topics against the topics of events, by whole-number arithmetic.

The topics must hold each event that was acknowledged to its producer, except those that a failover
explains: a cluster acknowledges before it replicates. What the topics hold is then what was
produced: of a stream with positions each event once, in order, up to the first that is lost; of
another every entry. The output topics must hold exactly the outputs of the sequential run over
these events, one for each, in order, in one epoch, with the tags that follow from them. The dead
letters are the entries behind lost positions, and no others.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, Final

import numpy as np

from tests.faults.history import FIRST_TAG, Chunk, next_tag
from tests.faults.network import FEATURES, OUTPUT, UNITS, ZERO, Rows, compute
from tests.faults.topics.layout import (
    GROUP,
    PARTITIONS,
    has_positions,
    number_field,
    partition_of,
    topic,
)

PAGE: Final = 5_000

Entry = tuple[bytes, dict[bytes, bytes]]
Output = tuple[int, str, str, list[float]]
"""Position, epoch, tag and values."""


def read_entries(client: Any, name: str) -> Iterator[Entry]:
    """All entries of a topic."""
    after = "-"
    while entries := client.xrange(name, after, "+", PAGE):
        yield from entries
        after = f"({entries[-1][0].decode()}"


class Produced:
    """What a topic holds, by stream.

    Attributes:
        rows: the events that are to be processed, in order.
        numbers: of the events.
        ahead: ids of the entries behind a position that is missing.
        duplicates: how many entries repeat a position.
    """

    def __init__(self) -> None:
        self.rows: dict[str, list[list[int]]] = defaultdict(list)
        self.numbers: dict[str, set[int]] = defaultdict(set)
        self.ahead: set[bytes] = set()
        self.duplicates = 0

    def add(self, entry_id: bytes, fields: dict[bytes, bytes]) -> None:
        """Add an entry behind those before."""
        stream = fields[b"stream"].decode()
        number, rows = int(fields[number_field(stream).encode()]), self.rows[stream]
        self.numbers[stream].add(number)
        if has_positions(stream) and number > len(rows):
            self.ahead.add(entry_id)
        elif has_positions(stream) and number < len(rows):
            self.duplicates += 1
        else:
            rows.append(json.loads(fields[b"event"]))

    def lost(self, stream: str, told: int) -> Iterator[tuple[int, int]]:
        """The ranges of events that are missing, of so many that were acknowledged."""
        missing = sorted({*range(told)} - self.numbers[stream])
        for _, group in groupby(enumerate(missing), lambda pair: pair[1] - pair[0]):
            numbers = [number for _, number in group]
            yield numbers[0], numbers[-1] + 1


def check_topics(
    client: Any,
    told: dict[str, int],
    is_explained: Callable[[str, int, int], bool],
    seen: dict[str, int],
) -> list[str]:
    """What is wrong in all topics; counts what was checked in `seen`.

    Args:
        told: how many events of each stream were acknowledged to its producer.
        is_explained: whether the store may have lost a stream's events from one to another.
    """
    findings = []
    for partition in range(PARTITIONS):
        produced, outputs = Produced(), _read_outputs(client, partition)
        for entry in read_entries(client, topic(partition)):
            produced.add(*entry)
        findings += [
            f"an output of stream {name}" for name in outputs.keys() - produced.rows.keys()
        ]
        for stream in [stream for stream in told if partition_of(stream) == partition]:
            for start, end in produced.lost(stream, told[stream]):
                seen["events lost by a failover"] += end - start
                if not is_explained(stream, start, end):
                    findings.append(f"{stream}: the store lost the acknowledged {start} to {end}")
            rows = np.array(produced.rows[stream], np.int8).reshape(-1, FEATURES)
            findings += _check_stream(stream, rows, outputs[stream])
            seen["outputs checked"] += len(outputs[stream])
            seen["streams"] += 1
        seen["duplicates in the topics"] += produced.duplicates
        findings += _check_dead_letters(client, partition, produced, seen)
        findings += _check_group(client, topic(partition))
    return findings


def _check_dead_letters(
    client: Any, partition: int, produced: Produced, seen: dict[str, int]
) -> Iterator[str]:
    missing = set(produced.ahead)
    for entry_id, fields in read_entries(client, topic(partition, "dead")):
        if fields[b"carry-entry"] not in missing or fields[b"carry-code"] != b"position_ahead":
            yield f"a dead letter {entry_id!r}: {fields}"
        missing.discard(fields[b"carry-entry"])
        seen["dead letters behind lost events"] += 1
    if missing:
        yield f"{len(missing)} entries behind lost events are no dead letters, {min(missing)!r}"


def _check_group(client: Any, name: str) -> list[str]:
    groups = client.xinfo_groups(name) if client.exists(name) else []
    pending = sum(each["pending"] for each in groups if each["name"] == GROUP.encode())
    return [f"{name}: {pending} entries are pending"] if pending else []


def _read_outputs(client: Any, partition: int) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = defaultdict(list)
    for _, fields in read_entries(client, topic(partition, "out")):
        head = int(fields[b"position"]), fields[b"epoch"].decode(), fields[b"tag"].decode()
        values = json.loads(fields[b"outputs"])[OUTPUT]
        outputs[fields[b"stream"].decode()].append((*head, values))
    return outputs


def _check_stream(stream: str, rows: Rows, outputs: list[Output]) -> Iterator[str]:
    expected = compute(ZERO, rows)
    for position, output in enumerate(outputs[: len(rows)]):
        if output[0] != position:
            kind = "doubled, or out of order" if output[0] < position else "lost"
            yield f"{stream}: {kind}: expected position {position}, got {output[0]}"
            return
    if len(outputs) > len(rows):
        yield f"{stream}: {len(outputs) - len(rows)} outputs too many, {outputs[len(rows)][:3]}"
        return
    values = np.array([output[3] for output in outputs], np.float32).reshape(-1, UNITS)
    if (differing := np.flatnonzero((values != expected[: len(values)]).any(axis=1))).size:
        yield f"{stream}: other outputs than the sequential run at position {differing[0]}"
        return
    if len(outputs) < len(rows):
        yield f"{stream}: lost from position {len(outputs)} on, of {len(rows)} events"
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
