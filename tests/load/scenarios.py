"""Load scenarios: who sends what, for how long, and the thresholds of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace


class LoadError(Exception):
    """The load cannot be run; the message is one sentence for the person who started it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of chunks: its share of all chunks, and its number of events, drawn evenly."""

    name: str
    share: float
    min_steps: int
    max_steps: int


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a scenario: a share of its users for a share of its duration."""

    users_share: float
    duration_share: float


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Limits of a run; None is not checked. Wrong answers are never allowed.

    Attributes:
        max_error_share: chunks that were rejected or abandoned, of all.
        max_retry_share: repeated attempts, of all chunks.
        max_p95_ms, max_p99_ms: of the first kind of chunks, from the first attempt to the answer.
        min_chunks_per_s: chunks answered.
        min_rate_share: chunks answered, of those that users at their pace would have sent.
        min_compared_events: events whose outputs were compared with a second computation.
    """

    max_error_share: float | None = 0.0
    max_retry_share: float | None = 0.01
    max_p95_ms: float | None = 250.0
    max_p99_ms: float | None = 500.0
    min_chunks_per_s: float | None = None
    min_rate_share: float | None = None
    min_compared_events: float | None = 100


SHORT = Kind("short", 1.0, 1, 32)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario.

    Attributes:
        users: at the height of the load.
        streams: at most this many take turns, shared out evenly among the users.
        thresholds: limits of a run.
        chunks_per_s_per_user: None for the next chunk as soon as one is answered.
        stream_events: a stream is replaced by a new one after this many events.
        appends: all users send to the same streams at once, without positions.
        stages: one after another.
    """

    name: str
    users: int
    streams: int
    thresholds: Thresholds
    chunks_per_s_per_user: float | None = None
    stream_events: int = 2048
    appends: bool = False
    duration_s: float = 30.0
    stages: tuple[Stage, ...] = (Stage(1.0, 1.0),)
    kinds: tuple[Kind, ...] = (SHORT,)

    @property
    def longest_steps(self) -> int:
        """Events of the longest chunk."""
        return max(kind.max_steps for kind in self.kinds)

    @property
    def streams_per_user(self) -> int:
        """Streams that one user keeps in turn; all of them where users share them."""
        return self.streams if self.appends else max(1, self.streams // self.users)

    def users_in(self, stage: Stage) -> int:
        """Users of a stage; at least one."""
        return max(1, round(self.users * stage.users_share))

    @property
    def scheduled_chunks(self) -> float | None:
        """Chunks that all users send if each keeps its pace; None without a pace."""
        if self.chunks_per_s_per_user is None:
            return None
        user_s = sum(self.users_in(each) * each.duration_share for each in self.stages)
        return user_s * self.duration_s * self.chunks_per_s_per_user


FEW, MANY = Stage(0.1, 0.2), Stage(1.0, 0.1)
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        # an even pace, each stream in turn
        Scenario(
            "steady", 16, 160, Thresholds(max_retry_share=0.001, min_rate_share=0.9),
            chunks_per_s_per_user=4.0,
        ),
        # more and more users, each as fast as it is answered
        Scenario(
            "ramp", 48, 480, Thresholds(min_chunks_per_s=100.0),
            stages=tuple(Stage(share, 0.2) for share in (0.1, 0.25, 0.5, 0.75, 1.0)),
        ),
        # few users at an even pace, and three times suddenly ten times as many
        Scenario(
            "burst", 60, 240, Thresholds(min_rate_share=0.8), chunks_per_s_per_user=2.0,
            stages=(FEW, MANY, FEW, MANY, FEW, MANY, Stage(0.1, 0.1)),
        ),
        # all users append to the same streams at once
        Scenario(
            "hot", 16, 4, Thresholds(min_chunks_per_s=50.0), stream_events=8192, appends=True,
        ),
        # many streams, each used rarely
        Scenario(
            "cold", 16, 20_000,
            Thresholds(max_retry_share=0.001, min_chunks_per_s=100.0, min_compared_events=30),
            kinds=(replace(SHORT, max_steps=8),),
        ),
        # chunks of thousands of events among short ones, whose latency is limited
        Scenario(
            "long", 16, 160, Thresholds(max_p99_ms=750.0, min_rate_share=0.9),
            chunks_per_s_per_user=2.0, stream_events=16_384,
            kinds=(replace(SHORT, share=0.98), Kind("long", 0.02, 1000, 8000)),
        ),
    )
}  # fmt: skip


def with_options(
    scenario: Scenario,
    *,
    users: int | None = None,
    duration_s: float | None = None,
    thresholds: Sequence[str] = (),
) -> Scenario:
    """The scenario with the values of the command line.

    Args:
        thresholds: `NAME=VALUE` for every scenario, or `SCENARIO.NAME=VALUE` for one; the value
            `none` disables it.

    Raises:
        LoadError: no such threshold, or a value that is no number.
    """
    changes = {}
    for text in thresholds:
        left, _, value = text.partition("=")
        where, dot, name = left.rpartition(".")
        known = [field.name for field in fields(Thresholds)]
        if name not in known:
            raise LoadError(f"--threshold {text}: expected one of {', '.join(known)}")
        try:
            limit = None if value == "none" else float(value)
        except ValueError as error:
            raise LoadError(f"--threshold {text}: expected a number or none") from error
        if not dot or where == scenario.name:
            changes[name] = limit
    return replace(
        scenario,
        users=users or scenario.users,
        duration_s=duration_s or scenario.duration_s,
        thresholds=replace(scenario.thresholds, **changes),
    )


def with_longest_chunk(scenario: Scenario, max_steps: int) -> Scenario:
    """The scenario without a chunk of more than `max_steps` events, which a service accepts."""
    kinds = tuple(
        replace(
            kind, min_steps=min(kind.min_steps, max_steps), max_steps=min(kind.max_steps, max_steps)
        )
        for kind in scenario.kinds
    )
    return replace(scenario, kinds=kinds)
