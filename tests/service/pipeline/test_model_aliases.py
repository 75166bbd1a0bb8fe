"""Versions and aliases over several processes on one store."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from structlog.testing import capture_logs

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.history import HistorySpec
from models.spec.model import ModelSpec, parse_spec
from service.access.caller import ANYONE
from service.core.errors import (
    InvalidInput,
    VersionNotFound,
    VersionNotReady,
    VersionRejected,
)
from service.pipeline import model_aliases
from service.pipeline.model_versions import ModelVersions
from service.pipeline.pipeline import Pipeline
from tests.support.models import random_weights, small_spec
from tests.support.oracle import contracting_weights
from tests.support.pipelines import SPEC, make_artifact, rows_of, send, worker
from tests.support.servers import real_server
from tests.support.versions import Versions


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    folder = tmp_path_factory.mktemp("models")
    return [make_artifact(folder, seed) for seed in (1, 2, 3)]


@asynccontextmanager
async def processes(
    url: str, artifact: Artifact, count: int = 2, **settings: Any
) -> AsyncIterator[list[tuple[Pipeline, Versions]]]:
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(count):
            files = Versions(artifact.path.parent)
            given = {"on_model_change": "reset", **settings}
            started = worker(url, artifact, load_version=files, **given)
            made.append((await stack.enter_async_context(started), files))
        yield made


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def answers(pipeline: Pipeline) -> tuple[str, str | None, float]:
    champion, challenger, share = pipeline.versions["probe"].route
    return champion.version, challenger and challenger.version, share


async def change(pipeline: Pipeline, action: str, *arguments: object) -> None:
    """Change aliases, once every process has loaded what that needs."""
    while True:
        try:
            await pipeline.aliases.change(ANYONE, "probe", action, *arguments)  # type: ignore[arg-type]
            return
        except VersionNotReady:
            await asyncio.sleep(0.01)


async def test_aliases_reach_every_process(store_url: str, artifacts: list[Artifact]) -> None:
    old, new, _ = artifacts
    async with processes(store_url, old) as [(one, _), (two, _)]:
        await one.aliases.load(ANYONE, "probe", new.path.name, "nightly")
        for action, arguments, expected in (
            ("shadow", ("nightly",), (old.version, new.version, 0.0)),
            ("canary", (new.version[:6], 0.25), (old.version, new.version, 0.25)),
            ("promote", (new.version,), (new.version, old.version, 0.0)),
            ("rollback", (), (old.version, new.version, 0.0)),
        ):
            await change(two, action, *arguments)
            await until(lambda expected=expected: answers(one) == answers(two) == expected)  # type: ignore[misc]
        with pytest.raises(InvalidInput, match="a promotion to take back, got none"):
            await one.aliases.change(ANYONE, "probe", "rollback")
        await change(two, "promote", new.version)
        await until(lambda: answers(one) == answers(two) == (new.version, old.version, 0.0))
        await one.aliases.retire(ANYONE, "probe", old.version)
        await until(lambda: answers(two) == (new.version, None, 0.0))
        assert [*two.versions["probe"].loaded] == [new.fingerprint]
        with pytest.raises(InvalidInput, match="a promotion to take back"):
            await one.aliases.change(ANYONE, "probe", "rollback")


async def test_challenger_is_warm_after_a_restart_that_began_with_it(
    store_url: str, artifacts: list[Artifact]
) -> None:
    old, new, _ = artifacts
    async with processes(store_url, old, 1) as [(one, _)]:
        await one.aliases.load(ANYONE, "probe", new.path.name, None)
        await change(one, "shadow", new.version)
    # the last version in the folder of the model, which the record does not let answer
    async with processes(store_url, new, 1) as [(restarted, _)]:
        assert answers(restarted) == (old.version, new.version, 0.0)
        assert all(each.is_warm for each in restarted.versions["probe"].loaded.values())


async def test_a_failing_observer_of_switches_does_not_end_following(
    store_url: str, artifacts: list[Artifact]
) -> None:
    old, new, _ = artifacts
    async with processes(store_url, old) as [(one, _), (two, _)]:
        failures = []

        def fail(_: ModelVersions) -> None:
            failures.append(1)
            raise RuntimeError("planted")

        two.aliases.on_switch.append(fail)
        await one.aliases.load(ANYONE, "probe", new.path.name, "nightly")
        await change(one, "shadow", "nightly")
        await until(lambda: bool(failures))
        two.aliases.on_switch.remove(fail)
        await change(one, "promote", "nightly")
        await until(lambda: answers(two) == (new.version, old.version, 0.0))


async def test_promotion_waits_for_a_process_that_does_not_load_the_version(
    store_url: str, artifacts: list[Artifact]
) -> None:
    old, new, _ = artifacts
    async with processes(store_url, old) as [(one, _), (two, files)]:
        files.missing.add(new.path.name)
        await one.aliases.load(ANYONE, "probe", new.path.name, None)
        while True:
            with pytest.raises(VersionNotReady) as caught:
                await one.aliases.change(ANYONE, "probe", "promote", new.version)
            if new.path.name in caught.value.detail:
                break  # the reason of the process, once it has tried
            await asyncio.sleep(0.01)
        assert answers(one) == answers(two) == (old.version, None, 0.0)
        assert (await send(two, "s", rows_of(np.random.default_rng(1), 2), 0)).version
        # loaded again, it is tried again
        files.missing.clear()
        await one.aliases.load(ANYONE, "probe", new.path.name, "again")
        await change(one, "promote", new.version)
        await until(lambda: answers(two)[0] == new.version)


async def test_process_starts_with_the_recorded_versions(
    store_url: str, artifacts: list[Artifact]
) -> None:
    old, new, third = artifacts
    async with processes(store_url, old, 1) as [(one, _)]:
        await one.aliases.load(ANYONE, "probe", new.path.name, None)
        await one.aliases.load(ANYONE, "probe", third.path.name, None)
        await change(one, "promote", new.version)
        await change(one, "canary", third.version, 0.5)
        async with processes(store_url, old, 1) as [(two, _)]:
            assert answers(two) == (new.version, third.version, 0.5)
        files = Versions(old.path.parent)
        files.missing.add(third.path.name)
        with pytest.raises(VersionRejected, match="canary"):
            async with worker(store_url, old, load_version=files):
                pass
        await change(one, "shadow", third.version)
        async with worker(store_url, old, load_version=files) as three:
            # a shadow answers nothing: the process serves without it
            assert answers(three) == (new.version, None, 0.0)
            assert all(check.ok for check in await three.readiness())


async def test_process_starts_beside_a_version_that_the_champion_cannot_replace(
    store_url: str, artifacts: list[Artifact]
) -> None:
    """The last version in the folder may be one that was rejected."""
    old, new, _ = artifacts
    async with processes(store_url, old, 1) as [(one, _)]:
        await one.aliases.load(ANYONE, "probe", new.path.name, None)
        await change(one, "promote", new.version)
    described = SPEC.model_dump(mode="json")
    spec = parse_spec({**described, "heads": described["heads"][:2]})
    last = write_artifact(old.path.parent / "last", spec, contracting_weights(spec, 5))
    async with worker(store_url, last, load_version=Versions(old.path.parent)) as again:
        assert answers(again) == (new.version, old.version, 0.0)
        reply = await send(again, "s", rows_of(np.random.default_rng(1), 2), 0)
        assert reply.outputs.shape[1] == new.outputs.size


async def test_version_that_cannot_serve_the_model_is_rejected(
    store_url: str, artifacts: list[Artifact]
) -> None:
    old, new, _ = artifacts
    folder = old.path.parent

    def write(name: str, **changes: object) -> str:
        spec: ModelSpec = parse_spec({**SPEC.model_dump(mode="json"), **changes})
        write_artifact(folder / name, spec, contracting_weights(spec, 5))
        return name

    heads = SPEC.model_dump(mode="json")["heads"]
    async with processes(store_url, old, 1) as [(one, _)]:
        for path, reason in (
            ("missing", "manifest"),
            (write("wider", features=4), "input_features"),
            (write("fewer", heads=heads[:2]), "outputs"),
        ):
            with pytest.raises(VersionRejected, match=reason):
                await one.aliases.load(ANYONE, "probe", path, None)
        assert (await one.aliases.describe(ANYONE, "probe")).record.versions.keys() == {
            old.fingerprint.hex()
        }
        await one.aliases.load(ANYONE, "probe", new.path.name, "taken")
        with pytest.raises(VersionRejected, match="label"):
            await one.aliases.load(ANYONE, "probe", artifacts[2].path.name, "taken")
        # nor does it stay in memory
        assert one.versions["probe"].loaded.keys() == {old.fingerprint, new.fingerprint}
        for name in ("", "no-label", old.version[:3]):
            with pytest.raises(VersionNotFound):
                await one.aliases.change(ANYONE, "probe", "promote", name)
        with pytest.raises(InvalidInput, match="champion"):
            await one.aliases.retire(ANYONE, "probe", old.version)
        with pytest.raises(InvalidInput, match="champion"):
            await one.aliases.change(ANYONE, "probe", "shadow", old.version)


async def test_version_that_is_loaded_from_a_copy_is_there_from_then_on(
    store_url: str, artifacts: list[Artifact]
) -> None:
    """So that the first folder may be removed."""
    old, new, _ = artifacts
    folder = old.path.parent
    shutil.copytree(new.path, folder / "copy")
    async with processes(store_url, old, 1) as [(one, _)]:
        await one.aliases.load(ANYONE, "probe", new.path.name, None)
        await change(one, "promote", new.version)
        await one.aliases.load(ANYONE, "probe", "copy", None)
        files = Versions(folder)
        files.missing.add(new.path.name)
        async with worker(store_url, old, load_version=files) as again:
            assert answers(again)[0] == new.version


async def test_label_that_looks_like_another_version_names_neither(
    store_url: str, artifacts: list[Artifact]
) -> None:
    old, new, third = artifacts
    async with processes(store_url, old, 1) as [(one, _)]:
        await one.aliases.load(ANYONE, "probe", new.path.name, None)
        await one.aliases.load(ANYONE, "probe", third.path.name, new.version)
        with pytest.raises(VersionNotFound, match="several"):
            await one.aliases.change(ANYONE, "probe", "promote", new.version)
        await change(one, "promote", new.fingerprint.hex())
        assert answers(one)[0] == new.version


@pytest.mark.parametrize(
    ("policy", "history", "is_rejected"),
    [
        ("rewarm", None, True),
        ("rewarm", HistorySpec(events=10), False),
        ("reset", None, False),
        ("keep", None, False),
        ("refuse", HistorySpec(events=10), True),
    ],
)
async def test_version_that_would_reject_streams_answers_only_by_force(
    store_url: str,
    artifacts: list[Artifact],
    policy: Literal["rewarm", "keep", "reset", "refuse"],
    history: HistorySpec | None,
    is_rejected: bool,
) -> None:
    old, new, _ = artifacts
    settings = {"on_model_change": policy, "history": history}
    async with processes(store_url, old, 1, **settings) as [(one, _)]:
        await one.aliases.load(ANYONE, "probe", new.path.name, None)
        # without a history, states of the shadow are current only while nothing is dropped
        await change(one, "shadow", new.version)
        for action, share in (("canary", 0.5), ("promote", None)):
            if is_rejected:
                with pytest.raises(VersionNotReady, match="CARRY_HISTORY_EVENTS") as caught:
                    await one.aliases.change(ANYONE, "probe", action, new.version, share)
                assert not caught.value.retryable
            await one.aliases.change(ANYONE, "probe", action, new.version, share, force=is_rejected)
            # repeated, it changes nothing
            await one.aliases.change(ANYONE, "probe", action, new.version, share)
        await one.aliases.change(ANYONE, "probe", "rollback")
        assert answers(one) == (old.version, new.version, 0.0)


async def test_states_are_kept_only_by_a_version_with_the_same_encoding(
    store_url: str, tmp_path: Path
) -> None:
    artifacts = []
    for name, mean in (("old", 0.0), ("new", 1.0)):
        data = small_spec().model_dump(mode="json")
        data["name"] = "probe"
        [load] = [each for each in data["events"]["fields"] if each["name"] == "load"]
        load["mean"] = mean
        spec = parse_spec(data)
        artifacts.append(write_artifact(tmp_path / name, spec, random_weights(spec)))
    old, new = artifacts
    async with processes(store_url, old, 1, on_model_change="keep") as [(one, _)]:
        await one.aliases.load(ANYONE, "probe", "new", None)
        with pytest.raises(VersionNotReady, match="encoding"):
            await one.aliases.change(ANYONE, "probe", "promote", new.version)


async def test_changes_of_two_processes_at_once_are_both_applied(
    store_url: str, artifacts: list[Artifact]
) -> None:
    old, new, third = artifacts
    async with processes(store_url, old) as [(one, _), (two, _)]:
        await asyncio.gather(
            one.aliases.load(ANYONE, "probe", new.path.name, "a"),
            two.aliases.load(ANYONE, "probe", third.path.name, "b"),
        )
        record = (await one.aliases.describe(ANYONE, "probe")).record
        assert record.versions.keys() == {each.fingerprint.hex() for each in artifacts}


async def test_last_known_aliases_hold_while_the_store_does_not_answer(
    artifacts: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, _ = artifacts
    # no poll fails before, on a machine that suspends the server: the first failure is logged
    monkeypatch.setattr(model_aliases, "READ_S", 60.0)
    with real_server("valkey") as server:
        async with processes(server.url, old) as [(one, _), (two, _)]:
            await one.aliases.load(ANYONE, "probe", new.path.name, None)
            await change(one, "promote", new.version)
            await until(lambda: answers(two)[0] == new.version)
            server.pause()
            monkeypatch.setattr(model_aliases, "READ_S", 0.1)
            with capture_logs() as lines:
                await two.aliases.refresh()
                await two.aliases.refresh()
            assert "models_not_read" in [line["event"] for line in lines]
            assert answers(two)[0] == new.version
            server.resume()
            await change(one, "rollback")
            await until(lambda: answers(two)[0] == old.version)
