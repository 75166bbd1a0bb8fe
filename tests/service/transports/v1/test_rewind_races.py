"""Rewinds over HTTP that race chunks, forks and deletions, each checked against the oracle.

Every client follows the epochs that the service names: an epoch begins with the events of its
parent up to a position, and each acknowledged chunk extends it. The outputs of a chunk are those
of all events of its epoch up to there.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from tests.service.transports.v1.harness import Harness, harness
from tests.support.pipelines import oracle_outputs, rows_of
from tests.support.servers import RealServer

REWINDS = 200
REJECTED = {
    "chunk": {"epoch_mismatch", "position_ahead", "position_behind", "state_changed"},
    "rewind": {"position_unavailable", "state_changed", "stream_not_found"},
    "fork": {"stream_not_found", "state_changed"},
    "delete": {"stream_not_found", "state_changed"},
}
Rows = NDArray[np.float32]


class Client:
    """Clients of one stream, which know its epochs."""

    def __init__(self, api: Harness, name: str, artifact: Artifact, seed: int):
        self.api, self.name, self.artifact = api, name, artifact
        self.random = np.random.default_rng(seed)
        self.epochs: dict[str, Rows] = {}
        self.head: dict[str, Any] = {}
        self.outcomes: Counter[str] = Counter()
        self.forks = self.rewinds = 0

    async def ask(self, kind: str, method: str, path: str, **request: Any) -> Any:
        address = f"/v1/models/probe/streams/{self.name}{path}"
        response = await self.api.client.request(method, address, **request)
        if response.is_success:
            self.outcomes[kind] += 1
            return response.json() if response.content else {}
        code = response.json()["code"]
        assert code in REJECTED[kind], response.text
        self.outcomes[code] += 1
        return None

    def condition(self) -> dict[str, str]:
        if not self.head:
            return {}
        return {"if-match": f'"{self.head["epoch"]}-{self.head["tag"]}"'}

    async def chunk(self) -> tuple[str, Any, Any]:
        """A chunk under the epoch that was read last."""
        rows = rows_of(self.random, int(self.random.integers(1, 6)))
        body: dict[str, Any] = {"inputs": rows.tolist(), "position": self.head.get("position", 0)}
        if self.head:
            body["epoch"] = self.head["epoch"]
        return "chunk", rows, await self.ask("chunk", "POST", "/chunks", json=body)

    async def rewind(self) -> tuple[str, Any, Any]:
        """A rewind of the state that was read last."""
        if not self.head:
            return await self.chunk()
        most, parent, headers = self.head["position"], self.head["epoch"], self.condition()
        position = int(self.random.integers(max(0, most - 12), most + 2))
        body = {"position": position}
        self.rewinds += 1
        return (
            "rewind",
            parent,
            await self.ask("rewind", "POST", "/rewind", json=body, headers=headers),
        )

    async def delete(self) -> tuple[str, Any, Any]:
        return "delete", None, await self.ask("delete", "DELETE", "", headers=self.condition())

    async def fork(self) -> tuple[str, Any, Any]:
        """A fork, which leaves the stream as it is."""
        self.forks += 1
        to = f"{self.name}:{self.forks}"
        reply = await self.ask("fork", "POST", "/fork", json={"to": to})
        return "fork", to, reply

    async def round(self) -> None:
        kinds = [self.chunk, self.rewind, self.fork, self.delete]
        chosen = self.random.choice(4, size=2, p=[0.5, 0.42, 0.05, 0.03])
        results = await asyncio.gather(*(kinds[each]() for each in chosen))
        waiting = [result for result in results if result[2] is not None]
        while waiting:
            later = [result for result in waiting if not self.follow(*result)]
            assert len(later) < len(waiting), f"{later} cannot have happened"
            waiting = later
        await self.check()

    def follow(self, kind: str, given: Any, reply: dict[str, Any]) -> bool:
        """Follow what was applied; False if it came after something that is not followed yet."""
        if kind == "rewind":
            if given not in self.epochs or len(self.epochs[given]) < reply["position"]:
                return False
            self.epochs[reply["epoch"]] = self.epochs[given][: reply["position"]]
        elif kind == "chunk":
            start = reply["position"] - len(given)
            before = self.epochs.get(reply["epoch"])
            if reply.get("created"):
                before = given[:0]
            if before is None or len(before) < start:
                return False
            rows = self.epochs[reply["epoch"]] = np.concatenate([before[:start], given])
            expected = oracle_outputs(self.artifact, rows)[start:]
            outputs = reply["outputs"]
            packed = np.concatenate(
                [np.reshape(outputs[name], (len(given), -1)) for name in ("last", "out", "steep")],
                axis=1,
            )
            np.testing.assert_allclose(packed, expected, rtol=1e-4, atol=1e-5)
        return True

    async def check(self) -> None:
        """Read the stream: it has every acknowledged event of its epoch, and no other."""
        address = f"/v1/models/probe/streams/{self.name}"
        response = await self.api.client.get(f"{address}/history")
        if response.status_code == 404:
            self.head = {}
            return
        self.head = response.json()
        rows = self.epochs[self.head["epoch"]]
        assert self.head["position"] == len(rows)
        for chunk in self.head["chunks"]:
            start = chunk["position"]
            kept = np.array(chunk["inputs"], np.float32)
            np.testing.assert_array_equal(kept, rows[start : start + len(kept)])


async def test_racing_rewinds_are_exact_or_rejected_over_http(
    pipeline_server: RealServer, artifact: Artifact
) -> None:
    history = HistorySpec(events=24, snapshots=4)
    outcomes: Counter[str] = Counter()
    async with harness(pipeline_server, {"probe": artifact}, history=history) as api:
        clients = [Client(api, f"s{at}", artifact, seed=at) for at in range(8)]
        # until there were enough, and each kind of request was applied
        while sum(client.rewinds for client in clients) < REWINDS or REJECTED.keys() - outcomes:
            await asyncio.gather(*(client.round() for client in clients))
            outcomes = sum((client.outcomes for client in clients), Counter())
    print(dict(outcomes))
