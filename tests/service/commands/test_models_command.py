"""`carry models`: versions and aliases of a running service, by its HTTP API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from carry.cli import app
from models.artifact.artifact import Artifact
from tests.service.transports.v1.harness import Harness, harness
from tests.service.transports.v1.raw_http import port_of, serving
from tests.support.pipelines import make_artifact, rows_of, send
from tests.support.servers import RealServer, becomes
from tests.support.versions import Versions, stop_polling


@dataclass
class Commands:
    """`carry models` against one service, which starts with the first of these versions."""

    api: Harness
    url: str
    artifacts: list[Artifact]

    async def __call__(self, *words: str) -> Result:
        return await asyncio.to_thread(
            CliRunner().invoke, app, ["models", *words, "--url", self.url]
        )


@pytest.fixture
async def carry(
    pipeline_server: RealServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Commands]:
    # what a failed poll logs would be in the output of the command, which runs in this process
    stop_polling(monkeypatch)
    artifacts = [make_artifact(tmp_path, seed) for seed in (1, 2)]
    models = {"probe": artifacts[0]}
    load = Versions(tmp_path)
    # much, so that a challenger soon repays what its calls cost on a machine that suspends them
    running = harness(pipeline_server, models, load_version=load, shadow_budget=10)
    async with running as api, serving(api) as server:
        yield Commands(api, f"http://127.0.0.1:{port_of(server)}", artifacts)


async def test_version_is_loaded_promoted_rolled_back_and_retired(carry: Commands) -> None:
    old, new = carry.artifacts
    for words, expected in (
        (("load", "probe", new.path.name, "--label", "nightly"), ["champion", "-"]),
        (("shadow", "probe", "nightly"), ["champion", "challenger"]),
        (
            ("canary", "probe", new.version[:4], "0.25", "--force"),
            ["champion 0.75", "challenger 0.25"],
        ),
        (("promote", "probe", "nightly", "--force"), ["challenger", "champion"]),
        (("rollback", "probe"), ["champion", "challenger"]),
        (("list",), ["champion", "challenger"]),
        (("retire", "probe", "nightly"), ["champion"]),
    ):
        result = await carry(*words)
        assert result.exit_code == 0, result.output
        # the service logs in this process too
        lines = [each.split("  ") for each in result.stdout.splitlines() if "probe  " in each[:7]]
        assert [line[3] for line in lines] == expected
        assert lines[0][:2] == ["probe", old.version]
        assert {line[4] for line in lines} == {"loaded by 1 of 1"}


async def test_streams_of_every_version_survive_a_reset(carry: Commands) -> None:
    """`carry streams reset` deletes what no version of the service can continue."""
    rows = rows_of(np.random.default_rng(1), 3)
    await send(carry.api.pipeline, "of-the-old", rows, 0)
    await carry("load", "probe", carry.artifacts[1].path.name, "--label", "new")
    rejected = await carry("promote", "probe", "new")
    assert "carry: version_not_ready: " in rejected.output
    await carry("promote", "probe", "new", "--force")
    await send(carry.api.pipeline, "of-the-new", rows, 0)
    reset = ["streams", "reset", "probe", "--prefix", "", "--yes", "--url", carry.url]

    async def run() -> str:
        return (await asyncio.to_thread(CliRunner().invoke, app, reset)).stdout

    versions = ", ".join(artifact.version for artifact in carry.artifacts)
    assert f"reset 0 streams, kept 2 of version {versions}" in await run()
    await carry("retire", "probe", carry.artifacts[0].version)
    version = carry.artifacts[1].version
    assert f"reset 1 streams, kept 1 of version {version}" in await run()


async def test_rejections_are_one_line(carry: Commands) -> None:
    for words, reason in (
        (("load", "probe", "missing"), "version_rejected"),
        (("promote", "probe", "nightly"), "version_not_found"),
        (("rollback", "probe"), "invalid_input"),
        (("canary", "probe", carry.artifacts[0].version, "1.5"), "invalid_input"),
        (("list", "other"), "model_not_found"),
    ):
        result = await carry(*words)
        assert result.exit_code == 1
        assert f"carry: {reason}: " in result.output


async def test_report_compares_the_challenger_with_the_champion(carry: Commands) -> None:
    new = carry.artifacts[1]
    nothing = await carry("report", "probe")
    assert nothing.exit_code == 1
    assert "no challenger" in nothing.output
    for words in (("load", "probe", new.path.name), ("shadow", "probe", new.version)):
        assert (await carry(*words)).exit_code == 0
    for position in (0, 2, 4):
        body = {"inputs": [[0.5, 1.0, -0.5]] * 2, "position": position}
        assert (await carry.api.chunk(body)).status_code == 200
    seen = carry.api.counts.seen
    await becomes(lambda: seen["shadow_computed"] + seen["shadow_dropped"] == 3, "the shadow")
    # the service logs to the same output
    output = (await carry("report", "probe", "--json")).stdout
    report, _ = json.JSONDecoder().raw_decode(output[output.index("{") :])
    assert report["challenger"] == new.version
    assert report["chunks"] == {"computed": 3, "dropped": 0, "failed": 0}
    assert report["events"] == 6
    assert report["differences"]["out"]["mean"] > 0
    text = (await carry("report", "probe", new.version[:5])).stdout.splitlines()
    assert f"challenger {new.version}" in text
    assert [line.split()[1] for line in text if line.startswith("difference")] == [
        *carry.artifacts[0].outputs.slices
    ]
