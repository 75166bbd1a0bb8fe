"""Chunks without a position: each is appended wherever the stream stands, as often as it is sent.

An episode takes a new stream and sends its chunks all at once to all workers, every other one or
all of them byte-identical. Nothing is retried, since an append that is sent again is
appended again: what got no reply may or may not be applied.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import numpy as np

from tests.faults.http import JSON, Line, NoReply, chunk_body
from tests.faults.network import OUTPUT, Rows, random_events
from tests.faults.records import AppendAck, Episode, History, Span, Standing

CHUNKS = 16


class Appender:
    """Runs one episode after the other."""

    def __init__(
        self,
        name: str,
        ways: Mapping[str, int],
        history: History,
        random: np.random.Generator,
        timeout_s: float,
    ):
        self._name = name
        self._history = history
        self._random = random
        self._timeout_s = timeout_s
        self._lines = [
            (worker, Line(port))
            for _ in range(CHUNKS // len(ways) + 1)
            for worker, port in ways.items()
        ][:CHUNKS]
        self._episodes = 0

    async def run(self, stop: asyncio.Event, pause_s: float) -> None:
        """Episodes until told to stop."""
        while not stop.is_set():
            await self.episode()
            await asyncio.sleep(self._random.exponential(pause_s))

    async def episode(self) -> Episode:
        """One new stream."""
        self._episodes += 1
        name = f"{self._name}-{self._episodes}"
        same = random_events(self._random, 3)
        alike = self._random.random() < 0.5
        chunks = [
            same
            if alike or place % 2
            else random_events(self._random, int(self._random.integers(1, 6)))
            for place in self._random.permutation(CHUNKS)
        ]
        began_s = time.monotonic()
        answers = await asyncio.gather(
            *(
                self._append(name, rows, worker, line)
                for rows, (worker, line) in zip(chunks, self._lines, strict=True)
            )
        )
        acks = [answer for answer in answers if answer is not None]
        final = await self._read(name)
        episode = Episode(
            name, Span(began_s, time.monotonic()), CHUNKS, CHUNKS - len(acks), acks, final
        )
        self._history.episodes.append(episode)
        self._history.seen["appends"] += len(acks)
        return episode

    def close(self) -> None:
        """Drop the connections."""
        for _, line in self._lines:
            line.drop()

    async def _append(self, name: str, rows: Rows, worker: str, line: Line) -> AppendAck | None:
        body = chunk_body(rows, None)
        try:
            status, document = await line.ask(
                "POST", name, body=body, media=JSON, timeout_s=self._timeout_s
            )
        except NoReply:
            return None
        if status != 200:
            self._history.seen[f"failed {document['code']}"] += 1
            return None
        return AppendAck(
            rows,
            worker,
            document["epoch"],
            bytes.fromhex(document["tag"]),
            document["position"],
            np.asarray(document["outputs"][OUTPUT], np.float32),
        )

    async def _read(self, name: str) -> Standing | None:
        while True:
            for _, line in self._lines[:2]:
                try:
                    status, found = await line.ask("GET", name, timeout_s=self._timeout_s)
                except NoReply:
                    continue
                if status == 200:
                    return Standing(found["epoch"], bytes.fromhex(found["tag"]), found["position"])
                if status == 404:
                    return None
            await asyncio.sleep(0.1)
