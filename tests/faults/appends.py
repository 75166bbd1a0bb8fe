"""Appends: chunks without a position, which are applied as often as they are sent.

A burst takes a new stream and sends its chunks all at once to all workers, every other one or all
of them byte-identical. Nothing is retried: what got no reply may or may not be applied.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from service.client import Problem
from tests.faults.network import Reference, Rows, random_events
from tests.faults.records import AppendAck, AppendBurst, Head, History, Loss, Span
from tests.faults.requests import WorkerClient, outputs_of
from tests.faults.result import DOUBLED, LOST, MIXED, CheckResult, Finding

CHUNKS = 16


class Appender:
    """Runs one burst after the other."""

    def __init__(
        self,
        name: str,
        ports: Mapping[str, int],
        history: History,
        random: np.random.Generator,
        timeout_s: float,
    ):
        self._name = name
        self._history = history
        self._random = random
        self._clients = {worker: WorkerClient(port, timeout_s) for worker, port in ports.items()}
        self._bursts = 0

    async def run(self, stop: asyncio.Event, pause_s: float) -> None:
        """Send bursts until `stop` is set."""
        while not stop.is_set():
            await self.burst()
            await asyncio.sleep(self._random.exponential(pause_s))

    async def burst(self) -> AppendBurst:
        """Send one burst to a new stream."""
        self._bursts += 1
        name = f"{self._name}-{self._bursts}"
        same = random_events(self._random, 3)
        all_equal = self._random.random() < 0.5
        chunks = [
            same
            if all_equal or place % 2
            else random_events(self._random, int(self._random.integers(1, 6)))
            for place in self._random.permutation(CHUNKS)
        ]
        workers = list(self._clients)
        began_s = time.monotonic()
        answers = await asyncio.gather(
            *(
                self._append(name, rows, workers[place % len(workers)])
                for place, rows in enumerate(chunks)
            )
        )
        acks = [answer for answer in answers if answer is not None]
        final = await self._read_head(name)
        span = Span(began_s, time.monotonic())
        burst = AppendBurst(name, span, CHUNKS - len(acks), acks, final)
        self._history.bursts.append(burst)
        self._history.seen["appends"] += len(acks)
        return burst

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.close()

    async def _append(self, name: str, rows: Rows, worker: str) -> AppendAck | None:
        try:
            document = await self._clients[worker].send(name, rows, None)
        except Problem as problem:
            if problem.status:
                self._history.seen[f"failed {problem.code}"] += 1
            return None
        tag = bytes.fromhex(document["tag"])
        outputs = outputs_of(document)
        return AppendAck(rows, document["epoch"], tag, document["position"], outputs)

    async def _read_head(self, name: str) -> Head | None:
        while True:
            for client in self._clients.values():
                try:
                    return await client.read_head(name)
                except Problem:
                    continue
            await asyncio.sleep(0.1)


def check_burst(
    burst: AppendBurst, losses: Sequence[Loss], reference: Reference, result: CheckResult
) -> None:
    """Check that each acknowledged append has a place of its own, after the ones before it.

    Where chunks got no reply, the stream may be longer than the acknowledged ones. A burst during
    which a fault may have taken acknowledged chunks away is not checked.
    """
    span = burst.span
    if any(loss.since_s <= span.until_s and span.from_s <= loss.done_s for loss in losses):
        return
    result.bursts += 1
    acks = sorted(burst.acks, key=lambda ack: ack.position)
    places = [(ack.position - len(ack.rows), ack.position) for ack in acks]

    def find(kind: str, what: str) -> None:
        result.findings.append(Finding(kind, burst.name, what))

    for before, after in pairwise(places):
        if after[0] < before[1]:
            find(LOST, f"two appends were acknowledged for {before} and {after}")
            return
    if len({ack.epoch for ack in acks}) > 1 or len({ack.tag for ack in acks}) < len(acks):
        find(MIXED, "appends were acknowledged in two epochs, or under one tag")
    applied = sum(len(ack.rows) for ack in acks)
    position = burst.final.position if burst.final is not None else 0
    if position < applied or (position > applied and not burst.unknown):
        kind = LOST if position < applied else DOUBLED
        find(kind, f"is at {position} after {applied} events were acknowledged")
    state, at = reference.zero(), 0
    for ack, (start, end) in zip(acks, places, strict=True):
        if start != at:
            return
        outputs = reference.outputs(state, ack.rows)
        if (ack.outputs != outputs).any():
            find(MIXED, f"the append at {start} has outputs that do not follow")
            return
        state, at = outputs[-1], end
