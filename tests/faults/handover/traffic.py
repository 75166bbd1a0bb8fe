"""What goes on while a history is backfilled and loaded: a producer that appends to topics, and
clients that send chunks with positions and retry blindly."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from carry_client import Problem, stream_path
from carry_client.aio import AsyncCarry
from carry_client.errors import NoAnswer
from tests.faults.handover.check import Output
from tests.faults.handover.layout import Topics, event_of
from tests.faults.network import MODEL, OUTPUT
from tests.faults.topics.layout import Events

LEAST_BURSTS, MOST_BURSTS, BURST_SHARE = 4, 64, 0.02
"""Bursts of events that are appended together: to this share of the streams."""

LONGEST_BURST, LONGEST_CHUNK = 6, 6
PAUSE_S: Final = 0.02
LONGEST_PAUSE_S: Final = 1.5
"""Between two tries: on a busy machine many tries would keep the workers from starting."""

DUPLICATES: Final = 0.1
"""Share of the chunks that are sent to two workers at once."""

TIMEOUT_S: Final = 30.0
FINISH_S: Final = 120.0


class Producer(threading.Thread):
    """Appends events of streams in random order until it is stopped; each stream's are in order.

    The store does not fail, so every event is appended once.

    Args:
        may_append: whether more may be appended now.

    Attributes:
        ends: of each stream, behind its last event.
        appended: events of all streams.
    """

    def __init__(
        self,
        client: Any,
        topics: Topics,
        events: Events,
        streams: Sequence[str],
        may_append: Callable[[], bool],
        seed: int,
    ):
        super().__init__(daemon=True)
        self.stopped, self.appended = threading.Event(), 0
        self.ends = dict.fromkeys(streams, 0)
        self._client, self._topics, self._events = client, topics, events
        self._may_append = may_append
        self._random = np.random.default_rng(seed)

    def append_to(self, streams: Sequence[str]) -> None:
        """Append a burst to each of these streams; call while the thread does not run."""
        for first in range(0, len(streams), MOST_BURSTS):
            self._append(streams[first : first + MOST_BURSTS])

    def stop(self) -> None:
        """End the thread, if it was started."""
        self.stopped.set()
        if self.ident is not None:
            self.join()

    def run(self) -> None:
        """Append bursts until it is stopped."""
        names = list(self.ends)
        count = min(MOST_BURSTS, max(LEAST_BURSTS, round(BURST_SHARE * len(names))))
        while not self.stopped.is_set():
            if self._may_append():
                chosen = self._random.choice(len(names), count, replace=False)
                self._append([names[at] for at in chosen])
            self.stopped.wait(PAUSE_S)

    def _append(self, streams: Sequence[str]) -> None:
        """Append a burst of each of these streams."""
        counts = self._random.integers(1, LONGEST_BURST, len(streams), endpoint=True).tolist()
        pipe = self._client.pipeline(transaction=False)
        for stream, count in zip(streams, counts, strict=True):
            start, topic = self.ends[stream], self._topics.source(stream)
            number_field = "position" if stream[0] == "p" else "number"
            for number, row in enumerate(self._events.read(stream, start, count), start):
                event = json.dumps(event_of(row))
                pipe.xadd(topic, {"stream": stream, "event": event, number_field: number})
        pipe.execute()
        for stream, count in zip(streams, counts, strict=True):
            self.ends[stream] += count
        self.appended += sum(counts)


@dataclass(slots=True, eq=False)
class ClientStream:
    """A stream of the HTTP API.

    Attributes:
        position: behind the last event that was acknowledged.
        length: of the chunk that is sent, or was rejected before the stream was loaded; 0 for none.
        outputs: of the events since the first position.
        epochs: that replies named.
    """

    name: str
    position: int
    length: int = 0
    outputs: list[Output] = field(default_factory=list)
    epochs: set[str] = field(default_factory=set)


class Clients:
    """Clients of the HTTP API: each takes a stream, sends its next chunk until that is answered,
    and returns the stream. A chunk is rejected while its stream is not loaded.

    Args:
        urls: of the workers.
        streams: where each begins.

    Attributes:
        delivered: events that were acknowledged.
        unanswered: streams without any, by kind.
        tasks: of the clients.
        findings: answers that no stream may get.
    """

    def __init__(
        self,
        urls: Sequence[str],
        events: Events,
        streams: Mapping[str, int],
        count: int,
        seed: int,
    ):
        self.streams = [ClientStream(name, start) for name, start in streams.items()]
        self.delivered, self.seen = 0, Counter[str]()
        self.unanswered = Counter(name[0] for name in streams)
        self.findings: list[str] = []
        self._events, self._queue = events, deque(self.streams)
        self._workers = [AsyncCarry(url, encoding="json") for url in urls]
        self._stopped = asyncio.Event()
        randoms = np.random.default_rng(seed).spawn(min(count, len(self.streams)))
        self.tasks = [asyncio.create_task(self._send_all(random)) for random in randoms]

    async def stop(self) -> None:
        """Let every client end its chunk."""
        self._stopped.set()
        ended, late = await asyncio.wait(self.tasks, timeout=FINISH_S)
        self.findings += [f"a client did not end its chunk in {FINISH_S} s" for _ in late]
        for task in late:
            task.cancel()
        await asyncio.gather(*ended)
        await asyncio.gather(*(worker.close() for worker in self._workers))

    def ends(self) -> Iterator[tuple[str, int]]:
        """The streams and behind which event each is."""
        return ((stream.name, stream.position) for stream in self.streams)

    async def _send_all(self, random: np.random.Generator) -> None:
        while self._queue and not self._stopped.is_set():
            stream = self._queue.popleft()
            if await self._deliver(stream, random):
                self._queue.append(stream)

    async def _deliver(self, stream: ClientStream, random: np.random.Generator) -> bool:
        """Send a stream's next chunk until it is answered; False if the stream is lost."""
        stream.length = stream.length or int(random.integers(1, LONGEST_CHUNK, endpoint=True))
        rows = self._events.read(stream.name, stream.position, stream.length)
        body = {"position": stream.position, "events": list(map(event_of, rows))}
        pause_s = PAUSE_S
        while True:
            copies = 1 + (random.random() < DUPLICATES)
            workers = random.choice(len(self._workers), copies, replace=False)
            answers = await asyncio.gather(*(self._send(at, stream.name, body) for at in workers))
            replies = [answer for answer in answers if not isinstance(answer, Problem)]
            if replies:
                self._receive(stream, replies)
                return True
            for problem in answers:
                if problem.code == "position_ahead" and not stream.outputs:
                    # not loaded yet
                    self.seen["chunks rejected before their stream was loaded"] += 1
                    await asyncio.sleep(random.uniform(0, LONGEST_PAUSE_S))
                    return True
                if problem.status and not problem.is_retryable:
                    self.findings.append(f"{stream.name}: {dict(problem.document)}")
                    self.unanswered[stream.name[0]] -= not stream.outputs
                    return False
            self.seen["chunks sent again"] += 1
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _send(self, worker: int, stream: str, body: object) -> Any:
        """Send a chunk once: a reply, or a problem."""
        path = f"{stream_path(MODEL, stream)}/chunks"
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._workers[worker].request("POST", path, body)
        except TimeoutError:
            return NoAnswer(TimeoutError(f"nothing within {TIMEOUT_S} s"))
        except Problem as problem:
            return problem

    def _receive(self, stream: ClientStream, replies: Sequence[Any]) -> None:
        """Record the outputs of a chunk; several replies must be equal."""
        values = [np.array(reply["outputs"][OUTPUT], np.float32) for reply in replies]
        if any(not np.array_equal(each, values[0]) for each in values):
            self.findings.append(f"{stream.name}: different replies to one chunk")
        stop = stream.position + stream.length
        self.unanswered[stream.name[0]] -= not stream.outputs
        for reply in replies:
            self.seen["replays"] += bool(reply["replayed"])
            stream.epochs.add(reply["epoch"])
            if reply["position"] != stop or len(stream.epochs) > 1:
                self.findings.append(
                    f"{stream.name}: expected position {stop} in one epoch, got "
                    f"{reply['position']} in {sorted(stream.epochs)}"
                )
        stream.outputs += zip(range(stream.position, stop), values[0], strict=True)
        self.delivered += stream.length
        stream.position, stream.length = stop, 0


def outputs_of(clients: Clients) -> dict[str, list[Output]]:
    """The outputs that clients received, by stream."""
    return defaultdict(list, {stream.name: stream.outputs for stream in clients.streams})
