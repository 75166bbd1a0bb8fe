"""The page about backfilled streams, as written: a topic, a service and two versions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import polars as pl
import pytest

from models.artifact.writing import write_artifact
from models.spec.model import parse_spec
from models.spec.spec_file import read_spec
from tests.support.consumers import ConsumerProcess
from tests.support.models import random_weights
from tests.support.needs import needs_tools
from tests.support.pages import DEFAULT_URL, blocks
from tests.support.servers import RealServer, real_server, until
from tests.support.service import running

PAGE = "docs/how-to/backfill-streams.md"
STORE_URL = "redis://localhost:6379"
FILES = ("pumps.py", "pumps.yaml", "consumer.yaml")
PUMPS, LOADED = 20, 2160
FITTED = {"at": {"gap_mean": 8.0, "gap_std": 1.0}, "pressure": {"mean": 5.0, "std": 0.6}}
"""Numbers that training fits to the data."""


@pytest.fixture
def store() -> Iterator[RealServer]:
    with real_server("valkey") as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's files, and the first version of its model."""
    contents = [text for language, text in blocks(PAGE) if language in ("python", "yaml")]
    for name, text in zip(FILES, contents, strict=True):
        (tmp_path / name).write_text(text)
    write_version(tmp_path, "first", 1)
    return tmp_path


def write_version(folder: Path, name: str, seed: int) -> None:
    """Write a version of the page's model, which is not trained."""
    content = read_spec(folder / "pumps.yaml").model_dump(mode="json")
    for field in content["events"]["fields"]:
        field |= FITTED[field["name"]]
    spec = parse_spec(content)
    write_artifact(folder / "models" / "pumps" / name, spec, random_weights(spec, seed))


@pytest.fixture
def shell(folder: Path, store: RealServer) -> Callable[..., str]:
    """Runs a script in the folder, and returns what it prints."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(script: str, url: str = DEFAULT_URL) -> str:
        script = script.replace(STORE_URL, store.url).replace(DEFAULT_URL, url)
        done = subprocess.run(
            ["sh", "-euc", script],
            cwd=folder,
            env={**os.environ, "PATH": programs, "CARRY_STORE_WAIT_S": "60"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


def archived(folder: Path, stream: str) -> pl.DataFrame:
    """The outputs of a stream's events in the history."""
    outputs = pl.read_parquet(folder / "out" / "outputs")
    return outputs.filter(pl.col("stream") == stream).sort("position")


@needs_tools("sh", "curl")
@pytest.mark.timeout(900)
def test_commands_of_the_page_run_as_written(
    folder: Path, store: RealServer, shell: Callable[..., str]
) -> None:
    archive, estimate, compute, load, consume, produce, position, version, promote = [
        text for language, text in blocks(PAGE) if language == "sh"
    ]
    (printed, *_) = [text for language, text in blocks(PAGE) if language == "text"]
    shell(archive)
    shell(estimate)
    assert not (folder / "out").exists()
    shell(compute)
    assert archived(folder, "pump-7")["position"].to_list() == list(range(LOADED))
    assert printed.strip() in shell(load)
    # the topic has the last hours of the archive
    with store.client() as client:
        rows = pl.read_parquet(folder / "history" / "2025-03.parquet").tail(10 * PUMPS)
        for row in rows.iter_rows(named=True):
            event = json.dumps({name: row[name] for name in ("at", "pressure")})
            client.xadd("readings", {"stream": row["pump"], "event": event}, id=row["entry"])
        words = consume.replace(STORE_URL, store.url).split()[2:]
        words = [str(folder / word) if word in FILES else word for word in words]
        options = ("--models", str(folder / "models"))
        consumer = ConsumerProcess(folder / "consumer.log", *words, *options)
        try:
            consumer.wait_for("consumer_joined")
            shell(produce)
            until(lambda: client.xlen("scores") == PUMPS, "the outputs of the live readings", 240)
            (first, *_) = client.xrange("scores")
            assert int(first[1][b"position"]) == LOADED
        finally:
            consumer.fork.kill()
    with running(folder, folder / "models", redis_url=store.url) as service:
        assert json.loads(shell(position, service.url))["position"] == LOADED + 1
        write_version(folder, "second", 2)
        shell(version)
        shell(promote, service.url)
        event = {"at": 1_735_689_600_000 + (LOADED + 1) * 3_600_000, "pressure": 4.5}
        reply = httpx.post(
            f"{service.url}/v1/models/pumps/streams/pump-7/chunks",
            json={"position": LOADED + 1, "events": [event]},
            timeout=60,
        ).json()
        assert (reply["position"], "warm" in reply) == (LOADED + 2, False)
        assert reply["version"] != first[1][b"version"].decode()
