"""Random rewinds against the float64 oracle, racing chunks, rewinds, forks, restores, deletions and
changes of the version: every one is exact or rejected, and no acknowledged event is lost.

Each round sends up to three requests at once to each stream. An epoch is followed from where it
began: from nothing, from a given state, or from a position of the epoch that a rewind or a fork
names. So the oracle knows every state that a stream may have had, whatever order the store chose.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from models.spec.state import State
from service.access.caller import ANYONE
from service.core.errors import CarryError, PositionUnavailable, StreamNotFound
from service.core.values import Feed, Precondition, Reply, StreamHead, StreamKey, StreamState
from service.engine.runtimes.onnx import OnnxRuntime
from service.pipeline.model_versions import Route
from service.pipeline.pipeline import Pipeline
from service.pipeline.rewind import available_positions
from service.pipeline.served_model import ServedModel
from tests.support.oracle import oracle_step
from tests.support.pipelines import chunk_of, make_artifact, rows_of, worker

HISTORY = HistorySpec(events=48, snapshots=4)
LONGEST = 12
OUTCOMES = {
    *("chunk", "rewind", "delete", "restore", "promote"),
    *("position_unavailable", "state_changed"),
}
"""What a game has to contain, whatever order the requests arrive in."""

FollowedState = NDArray[np.float64]
Policy = Literal["reset", "rewarm"]
Request = Callable[[], Awaitable[Any]]


@dataclass
class Epoch:
    """The events of one epoch of a stream, and its states as the oracle computes them.

    Attributes:
        version: of the model, which wrote the last state.
        first: the first position whose state is known; 0 if the stream began from nothing.
        states: float64 [N] by position from `first` on, for each version for which they are known.
        rows: the events from `first` on.
        rewarmed: versions that rewarmed the stream without having seen its start, and where.
    """

    version: Artifact
    first: int
    states: dict[str, list[FollowedState]]
    rows: list[NDArray[np.float32]] = field(default_factory=list)
    rewarmed: dict[str, int] = field(default_factory=dict)

    @classmethod
    def begin(cls, version: Artifact, versions: Iterable[Artifact]) -> Epoch:
        """A stream before its first event, by each version."""
        zeros = {each.version: [each.state.zero().floats.astype(float)] for each in versions}
        return cls(version, 0, zeros)

    @property
    def position(self) -> int:
        return self.first + len(self.rows)

    def append(
        self, row: NDArray[np.float32], versions: Iterable[Artifact]
    ) -> FollowedState | None:
        """Follow an event; returns the outputs of the version that answers, if it is exact."""
        self.rows.append(row)
        answers: dict[str, FollowedState] = {}
        for each in versions:
            if (states := self.states.get(each.version)) is not None:
                outputs, state = oracle_step(each.spec, each.weights, row[np.newaxis], states[-1])
                states.append(state)
                answers[each.version] = outputs[0]
        version = self.version.version
        return None if version in self.rewarmed else answers[version]

    def cut(self, version: Artifact, position: int) -> Epoch:
        """An epoch that begins with the events up to a position, and a state of a version."""
        count = position - self.first
        states = {name: states[: count + 1] for name, states in self.states.items()}
        rewarmed = {name: since for name, since in self.rewarmed.items() if since < position}
        return Epoch(version, self.first, states, self.rows[:count], rewarmed)

    def is_exact(self, stored: StreamState) -> bool:
        """Whether a stream has the state of its position, by the version that wrote it."""
        version, at = stored.fingerprint.hex()[:12], stored.head.position - self.first
        if self.rewarmed.get(version, stored.head.position) < stored.head.position:
            return at <= len(self.rows)
        states = self.states.get(version)
        if states is None or not 0 <= at < len(states):
            return False
        return np.allclose(stored.state.floats, states[at], rtol=1e-4, atol=1e-5)


@dataclass
class Followed:
    """A stream, and all its epochs as the oracle follows them."""

    key: StreamKey
    epochs: dict[bytes, Epoch] = field(default_factory=dict)
    heads: list[StreamHead] = field(default_factory=list)


class Game:
    """Sends random requests to a few streams and checks every reply.

    Attributes:
        outcomes: how often a kind of request was applied or rejected.
    """

    def __init__(
        self, pipeline: Pipeline, versions: dict[str, Artifact], policy: Policy, seed: int
    ):
        print(f"seed {seed}")
        self.policy = policy
        self.random = np.random.default_rng(seed)
        self.pipeline = pipeline
        self.versions = versions
        self.outcomes: Counter[str] = Counter()
        self.streams: list[Followed] = []
        self.forks = 0

    # Requests

    def chunk(self, followed: Followed) -> Request:
        rows = rows_of(self.random, int(self.random.integers(1, LONGEST)))
        if self.random.random() < 0.05:
            rows = rows_of(self.random, 60)
        position, epoch = None, None
        if followed.heads and self.random.random() < 0.7:
            head = followed.heads[-1]
            position, epoch = head.position, head.epoch if self.random.random() < 0.7 else None
        chunk = chunk_of(followed.key.stream, rows, position, epoch=epoch)

        async def send() -> tuple[str, Any, Any]:
            return "chunk", rows, await self.pipeline.process(ANYONE, chunk)

        return send

    def rewind(self, followed: Followed) -> Request:
        if self.policy == "rewarm" and not followed.heads:
            return self.chunk(followed)  # of a stream that another request may create
        precondition = self.precondition(followed)
        head = followed.heads[-1] if followed.heads else None
        most = head.position + 3 if head else 9
        span = 20 if self.random.random() < 0.7 else most
        position = int(self.random.integers(max(0, most - span), most + 1))

        async def rewind() -> tuple[str, Any, Any]:
            new = await self.pipeline.streams.rewind(ANYONE, followed.key, position, precondition)
            return "rewind", (position, precondition), new

        return rewind

    def precondition(self, followed: Followed) -> Precondition | None:
        """Of a rewind. A rewarmed state does not tell where it came from, so it always has one."""
        if not followed.heads or (self.policy == "reset" and self.random.random() < 0.4):
            return None
        return Precondition((followed.heads[-1].etag,))

    def fork(self, followed: Followed) -> Request:
        if self.policy == "rewarm":
            return self.chunk(followed)
        self.forks += 1
        to = f"fork-{self.forks}"

        async def fork() -> tuple[str, Any, Any]:
            new = await self.pipeline.streams.fork(ANYONE, followed.key, to, None)
            return "fork", to, new

        return fork

    def delete(self, followed: Followed) -> Request:
        async def delete() -> tuple[str, Any, Any]:
            await self.pipeline.streams.delete(ANYONE, followed.key)
            return "delete", None, None

        return delete

    def restore(self, followed: Followed) -> Request:
        version = str(self.random.choice(list(self.versions)))
        artifact, position = self.versions[version], int(self.random.integers(0, 30))
        floats = self.random.normal(size=artifact.state.float_size).astype(np.float32)
        state = State(floats, artifact.state.initial().ints)

        async def restore() -> tuple[str, Any, Any]:
            new = await self.pipeline.streams.restore(
                ANYONE,
                followed.key,
                feed=Feed.INPUTS,
                position=position,
                fingerprint=artifact.fingerprint,
                state=state,
                precondition=Precondition(any_state=True) if followed.heads else None,
            )
            states = {version: [floats.astype(float)]}
            return "restore", Epoch(artifact, position, states), new

        return restore

    def promote(self, _: Followed) -> Request:
        async def promote() -> tuple[str, Any, Any]:
            versions = self.pipeline.versions["probe"]
            champion, challenger, _ = versions.route
            if challenger is not None:
                versions.route = Route(challenger, champion)
            return "promote", None, None

        return promote

    # Rounds

    async def round(self) -> None:
        """Send up to three requests to each stream at once, and check what became of them."""
        kinds = [self.chunk, self.rewind, self.fork, self.delete, self.restore, self.promote]
        shares = [0.635, 0.3, 0.02, 0.015, 0.02, 0.01]
        requests: list[tuple[Followed, Request]] = []
        for followed in self.streams:
            for _ in range(self.random.integers(1, 4)):
                kind = kinds[self.random.choice(len(kinds), p=shares)]
                requests.append((followed, kind(followed)))
        self.random.shuffle(requests)
        results = await asyncio.gather(*(self.outcome(request) for _, request in requests))
        for followed in [*self.streams]:
            pairs = zip(requests, results, strict=True)
            await self.check(followed, [result for (of, _), result in pairs if of is followed])

    async def outcome(self, request: Request) -> Any:
        try:
            kind, given, result = await request()
        except CarryError as error:
            if error.status >= 500:
                raise
            self.outcomes[error.code] += 1
            return None
        self.outcomes[kind] += 1
        return kind, given, result

    async def check(self, followed: Followed, results: list[Any]) -> None:
        """Extend the epochs of a stream by what was applied, in the order that follows from it."""
        waiting = [result for result in results if result is not None]
        while waiting:
            later = [each for each in waiting if not self.apply(followed, *each)]
            assert len(later) < len(waiting), f"{followed.key} cannot have come from {later}"
            waiting = later
        try:
            stored = await self.pipeline.streams.read(ANYONE, followed.key)
        except StreamNotFound:
            followed.heads.clear()
            return
        epoch = followed.epochs[stored.head.epoch]
        assert stored.head.position == epoch.position, "an acknowledged event is lost, or doubled"
        assert epoch.is_exact(stored)
        followed.heads.append(stored.head)
        await self.check_available(followed, stored)

    def apply(self, followed: Followed, kind: str, given: Any, result: Any) -> bool:
        """Follow a request; False if it came after one that is not followed yet."""
        if kind == "chunk":
            return self.apply_chunk(followed, given, result)
        if kind == "restore":
            followed.epochs[result.head.epoch] = given
        elif kind == "rewind":
            position, precondition = given
            assert result.head.position == position
            parents = followed.epochs
            if precondition is not None:
                parent = bytes.fromhex(precondition.etags[0].partition("-")[0])
                parents = {parent: followed.epochs[parent]}
            return self.begin(followed, result, parents)
        elif kind == "fork":
            fork = Followed(StreamKey("probe", given))
            if not self.begin(fork, result, followed.epochs):
                return False
            if len(self.streams) < 60:
                self.streams.append(fork)
                fork.heads.append(result.head)
        return True

    def apply_chunk(self, followed: Followed, rows: NDArray[np.float32], reply: Reply) -> bool:
        assert reply.version is not None
        version, start = reply.version.version, reply.head.position - len(rows)
        artifacts = self.versions.values()
        epoch = followed.epochs.get(reply.head.epoch)
        if reply.created:
            epoch = Epoch.begin(self.versions[version], artifacts)
            followed.epochs[reply.head.epoch] = epoch
        if epoch is None or epoch.position < start:
            return False
        assert epoch.position == start
        if self.policy == "reset":
            assert (epoch.version.version, reply.warm) == (version, None)
        epoch.version = self.versions[version]
        if reply.warm is not None:
            self.outcomes["inexact"] += 1
            epoch.rewarmed.setdefault(version, start)
        elif version not in epoch.states and version not in epoch.rewarmed:
            assert start - epoch.first >= HISTORY.events, "it has not forgotten the start"
            epoch.rewarmed[version] = start
        for row, output in zip(rows, reply.outputs, strict=True):
            expected = epoch.append(row, artifacts)
            if expected is not None:
                np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
                self.outcomes["exact events"] += 1
        return True

    def begin(self, followed: Followed, new: StreamState, parents: dict[bytes, Epoch]) -> bool:
        """Follow an epoch that begins with the state of another one at its position."""
        version = self.versions[new.fingerprint.hex()[:12]]
        for parent in reversed(parents.values()):
            if parent.is_exact(new):
                followed.epochs[new.head.epoch] = parent.cut(version, new.head.position)
                return True
        return False

    async def check_available(self, followed: Followed, stored: StreamState) -> None:
        """Rewind once while nothing else happens: what is offered is given, and nothing else."""
        key, streams = followed.key, self.pipeline.streams
        histories = await streams.histories(ANYONE, key)
        available = available_positions(histories)
        epoch, head = followed.epochs[stored.head.epoch], stored.head
        assert any(first <= head.position <= last for first, last in available)
        for history in histories if self.policy == "reset" else []:
            if history.served.version == epoch.version.version and history.positions:
                newest = history.positions[-1]
                assert head.position - newest < max(2 * LONGEST, 60)
                assert any(a <= newest and head.position <= b for a, b in available)
        position = int(self.random.integers(0, head.position + 2))
        is_available = any(first <= position <= last for first, last in available)
        rewinding = streams.rewind(ANYONE, key, position, Precondition((head.etag,)))
        if not is_available:
            with pytest.raises(PositionUnavailable) as rejection:
                await rewinding
            assert rejection.value.facts["available"] == [[*each] for each in available]
            self.outcomes["position_unavailable"] += 1
            return
        new = await rewinding
        self.outcomes["rewind"] += 1
        assert self.begin(followed, new, {head.epoch: epoch}), "the state is not exact"
        followed.heads.append(new.head)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    """Two versions of the probe model."""
    folder: Path = tmp_path_factory.mktemp("versions")
    return [make_artifact(folder, seed) for seed in (1, 2)]


async def play(
    url: str, artifacts: list[Artifact], policy: Policy, rewinds: int, seed: int
) -> None:
    """Play until there were so many rewinds, and each kind of outcome."""
    first, second = artifacts
    async with worker(
        url, first, runtime=OnnxRuntime(first), history=HISTORY, on_model_change=policy
    ) as pipeline:
        versions = pipeline.versions["probe"]
        challenger = ServedModel(second, OnnxRuntime(second), None, HISTORY)
        versions.add(challenger)
        versions.route = Route(versions.route.champion, challenger)
        game = Game(pipeline, {each.version: each for each in artifacts}, policy, seed)
        game.streams = [Followed(StreamKey("probe", f"s{at}")) for at in range(20)]
        seen = game.outcomes
        while seen["rewind"] + seen["position_unavailable"] < rewinds or OUTCOMES - seen.keys():
            await game.round()
    print(dict(game.outcomes))


@pytest.mark.parametrize("policy", ["reset", "rewarm"])
async def test_random_rewinds_are_exact_or_rejected(
    store_url: str, versions: list[Artifact], policy: Policy
) -> None:
    await play(store_url, versions, policy, 500, seed=20261130)


@pytest.mark.harness
@pytest.mark.parametrize("policy", ["reset", "rewarm"])
async def test_ten_thousand_random_rewinds_are_exact_or_rejected(
    store_url: str, versions: list[Artifact], policy: Policy
) -> None:
    await play(store_url, versions, policy, 10_000, seed=20261201)
