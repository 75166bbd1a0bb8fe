"""The tutorial of topics: its commands print what the page shows, against a service and a store."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.consumers import ConsumerProcess
from tests.support.forks import COMMAND
from tests.support.needs import needs_tools
from tests.support.pages import DEFAULT_URL, ROOT, agrees
from tests.support.pages import blocks as blocks_of
from tests.support.servers import real_server, until
from tests.support.service import Service, running

pytestmark = [needs_tools("curl"), pytest.mark.usefixtures("model_dir")]

PAGE = "docs/tutorials/streams-in-streams-out.md"
STORE_URL = "redis://localhost:6379"
CONSUME = ".venv/bin/carry consume "


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with real_server("valkey") as server:
        yield server.url


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path, store: str
) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("service"), model_dir, redis_url=store) as up:
        yield up


@pytest.fixture
def consume(model_dir: Path, tmp_path: Path) -> Iterator[Callable[[list[str]], None]]:
    """Starts a consumer by the words of its command."""
    started: list[ConsumerProcess] = []

    def start(words: list[str]) -> None:
        options = ("--models", str(model_dir / "flights"))
        started.append(ConsumerProcess(tmp_path / f"{len(started)}.log", *words, *options))
        started[-1].wait_for("consumer_joined")

    yield start
    for each in started:
        each.fork.kill()


def shell(script: str) -> str:
    """What a script prints."""
    done = subprocess.run(
        ["sh", "-euc", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(printed: str, language: str, shown: str) -> None:
    """Compare with what the page shows; which output is the newest depends on the batches."""
    if language == "text":
        assert shown.strip() in printed
        return
    got, expected = json.loads(printed), json.loads(shown)
    if "outputs" in expected:
        (output,), (example,) = got["outputs"], expected["outputs"]
        assert example.keys() <= output.keys()
        assert example["outputs"].keys() <= output["outputs"].keys()
        expected = {**expected, "outputs": got["outputs"]}
    agrees(got, expected)


def test_commands_print_what_the_page_shows(
    service: Service, store: str, consume: Callable[[list[str]], None]
) -> None:
    page = [
        (language, text.replace(STORE_URL, store).replace(DEFAULT_URL, service.url))
        for language, text in blocks_of(PAGE)
    ]
    shown = 0
    for (language, text), (kind, expected) in zip(page, [*page[1:], ("", "")], strict=True):
        if language != "sh":
            continue
        if text.startswith(CONSUME):
            consume(text.split()[2:])
            continue
        script = text.replace(".venv/bin/carry", COMMAND)
        if kind not in ("text", "json"):
            shell(script)
            continue
        shown += 1
        if "produce" in script:
            check(shell(script), kind, expected)
            continue

        def agrees_now(script: str = script, kind: str = kind, expected: str = expected) -> bool:
            try:
                check(shell(script), kind, expected)
            except (AssertionError, KeyError, ValueError):
                return False
            return True

        until(agrees_now, f"{expected} of {script}", poll_s=0.2)
    assert shown == 8


def test_lines_of_the_page_are_those_of_the_file() -> None:
    line = next(text for language, text in blocks_of(PAGE) if language == "json")
    recorded = shell("gunzip -c examples/topics/day.jsonl.gz | head -n 1")
    assert json.loads(line) == json.loads(recorded)
