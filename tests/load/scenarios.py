"""The scenarios of `scenarios.toml` as values, and what the command line changes in them.

Refused: unknown members, unknown thresholds, shares that do not add up to 1, and numbers out
of range; the message names the scenario and the member. Nothing is read at import.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

SCENARIOS = Path(__file__).with_name("scenarios.toml")
DELIVERIES = ("positions", "appends")


class LoadError(Exception):
    """The load cannot be run; the message is one sentence for the person who started it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of chunks.

    Attributes:
        share: of all chunks, above 0, at most 1.
        min_steps, max_steps: events per chunk, drawn evenly between the two.
    """

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
    """What must hold; None is not asked. The comments in `scenarios.toml` say what each is."""

    max_error_share: float | None = None
    max_retry_share: float | None = None
    max_p95_ms: float | None = None
    max_p99_ms: float | None = None
    min_chunks_per_s: float | None = None
    min_rate_share: float | None = None
    min_compared_events: float | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """Who sends what, for how long, and what must hold.

    Attributes:
        chunks_per_s_per_user: None for the next chunk as soon as one is answered.
        delivery: `positions` or `appends`.
    """

    name: str
    about: str
    users: int
    duration_s: float
    streams: int
    stream_events: int
    delivery: str
    stages: tuple[Stage, ...]
    kinds: tuple[Kind, ...]
    thresholds: Thresholds
    chunks_per_s_per_user: float | None = None

    @property
    def appends(self) -> bool:
        """Whether chunks go without positions."""
        return self.delivery == "appends"

    @property
    def longest_steps(self) -> int:
        """Events of the longest chunk."""
        return max(kind.max_steps for kind in self.kinds)

    def users_in(self, stage: Stage) -> int:
        """Users of a stage; at least one."""
        return max(1, round(self.users * stage.users_share))

    @property
    def asked_chunks(self) -> float | None:
        """Chunks that all users together send if each keeps its pace; None without a pace."""
        if self.chunks_per_s_per_user is None:
            return None
        user_s = sum(
            self.users_in(stage) * stage.duration_share * self.duration_s for stage in self.stages
        )
        return user_s * self.chunks_per_s_per_user


def read_scenarios(path: Path = SCENARIOS) -> dict[str, Scenario]:
    """Every scenario of a file by its name, in the file's order.

    Raises:
        LoadError: the file cannot be read, or says something that is not a scenario.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: {error}") from error
    return {name: _scenario(name, value) for name, value in document.items()}


def overridden(
    scenario: Scenario,
    *,
    users: int | None = None,
    duration_s: float | None = None,
    thresholds: Sequence[str] = (),
) -> Scenario:
    """The scenario with some values changed.

    Args:
        thresholds: `NAME=VALUE` for every scenario, or `SCENARIO.NAME=VALUE` for one; `none`
            as the value no longer asks it.

    Raises:
        LoadError: no such threshold, or a value that is no number.
    """
    changes = {}
    for text in thresholds:
        left, _, value = text.partition("=")
        where, dot, name = left.rpartition(".")
        if name not in {field.name for field in fields(Thresholds)}:
            known = ", ".join(field.name for field in fields(Thresholds))
            raise LoadError(f"--threshold {text}: expected one of {known}")
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


def fitted(scenario: Scenario, max_steps: int) -> Scenario:
    """The scenario with no chunk longer than `max_steps`, which a service accepts."""
    kinds = tuple(
        replace(
            kind,
            min_steps=min(kind.min_steps, max_steps),
            max_steps=min(kind.max_steps, max_steps),
        )
        for kind in scenario.kinds
    )
    return replace(scenario, kinds=kinds)


def _scenario(name: str, value: Any) -> Scenario:
    where = f"scenario {name!r}"
    if not isinstance(value, dict):
        raise LoadError(f"{where}: expected a table")
    given = {
        **value,
        "name": name,
        "stages": tuple(Stage(*stage) for stage in value.get("stages", ())),
        "kinds": tuple(_made(Kind, kind, where) for kind in value.get("kinds", ())),
        "thresholds": _made(Thresholds, value.get("thresholds", {}), where),
    }
    found: Scenario = _made(Scenario, given, where)
    wrong = list(_wrong(found))
    if wrong:
        raise LoadError(f"{where}: {wrong[0]}")
    return found


def _made(kind: type, given: Mapping[str, Any], where: str) -> Any:
    try:
        return kind(**given)
    except TypeError as error:
        raise LoadError(f"{where}: {str(error).partition(' ')[2]}") from error


def _wrong(scenario: Scenario) -> list[str]:
    """What cannot be meant, in words."""
    rules = {
        "users, streams and stream_events: expected at least 1": min(
            scenario.users, scenario.streams, scenario.stream_events
        )
        >= 1,
        "duration_s: expected above 0": scenario.duration_s > 0,
        "chunks_per_s_per_user: expected above 0": scenario.chunks_per_s_per_user is None
        or scenario.chunks_per_s_per_user > 0,
        f"delivery: expected one of {', '.join(DELIVERIES)}": scenario.delivery in DELIVERIES,
        "stages: expected shares of users in 0 to 1": all(
            0 < stage.users_share <= 1 for stage in scenario.stages
        ),
        "stages: expected shares of the duration that add up to 1": _adds_up(
            [stage.duration_share for stage in scenario.stages]
        ),
        "kinds: expected shares that add up to 1": _adds_up(
            [kind.share for kind in scenario.kinds]
        ),
        "kinds: expected 1 <= min_steps <= max_steps": all(
            1 <= kind.min_steps <= kind.max_steps for kind in scenario.kinds
        ),
    }
    return [text for text, holds in rules.items() if not holds]


def _adds_up(shares: Sequence[float]) -> bool:
    return all(share > 0 for share in shares) and abs(sum(shares) - 1) < 1e-9
