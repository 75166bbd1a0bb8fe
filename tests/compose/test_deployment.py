"""Deployment of docker-compose.yml: streams survive their containers.

`make compose-test` builds and starts it under another project's name and on a free port,
replays events while the service's container and Redis' restart, and verifies what came out. What
it started is removed at the end, its volume too.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.feeders import feeding
from tests.support.pages import blocks, run
from tests.support.servers import free_port, until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = "carry-test"
MODEL = "flights"
READY_S = 180
EVENTS = json.loads((REPOSITORY / "examples" / "first-chunk.json").read_text())["events"][:2]


def say(text: str) -> None:
    print(f"  {text}", flush=True)


@dataclass(frozen=True)
class Deployment:
    """The running containers."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def compose(self, *arguments: str, **environment: str) -> str:
        done = subprocess.run(
            ["docker", "compose", "-p", PROJECT, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "CARRY_PORT": str(self.port), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.fail(f"docker compose {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def up(self, *options: str) -> None:
        self.compose("up", *options, "--wait", "--wait-timeout", str(READY_S))

    def scale(self, services: int, **environment: str) -> list[str]:
        """Run so many services behind HAProxy, and return their containers."""
        self.compose("build", "haproxy")
        options = ("--scale", f"carry={services}", "--wait", "--wait-timeout", str(READY_S))
        self.compose("--profile", "haproxy", "up", *options, **environment)
        return self.compose("ps", "--quiet", "carry").split()

    def restart(self, service: str) -> None:
        began_s = time.monotonic()
        before = self.started_at(service)
        self.compose("restart", service)
        self.up()
        assert self.started_at(service) > before
        say(f"restarted {service}: ready after {time.monotonic() - began_s:.1f} s")

    def started_at(self, service: str) -> str:
        """When the service's container was started, RFC 3339."""
        container = self.compose("ps", "--quiet", service).strip()
        return self.inspect(container)["State"]["StartedAt"]

    def inspect(self, container: str) -> dict[str, Any]:
        done = subprocess.run(
            ["docker", "inspect", container], capture_output=True, text=True, check=True
        )
        found: dict[str, Any] = json.loads(done.stdout)[0]
        return found


@pytest.fixture(scope="module")
def deployment(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    running = Deployment(free_port())
    before = request.session.testsfailed
    down = ("--profile", "haproxy", "down", "--volumes", "--remove-orphans")
    running.compose(*down)
    ready = False
    try:
        began_s = time.monotonic()
        running.up("--build")
        ready = True
        say(f"built and ready on port {running.port} after {time.monotonic() - began_s:.1f} s")
        yield running
    finally:
        if not ready or request.session.testsfailed > before:
            print(running.compose("logs", "--no-color", "--tail", "60"))
        running.compose(*down)
        say("removed the containers and the volume")


def test_containers_are_hardened(deployment: Deployment) -> None:
    for service, user in (("carry", "carry"), ("redis", "redis")):
        container = deployment.compose("ps", "--quiet", service).strip()
        found = deployment.inspect(container)
        assert found["Config"]["User"] == user
        assert found["HostConfig"]["ReadonlyRootfs"]
        assert found["HostConfig"]["CapDrop"] == ["ALL"]
        assert "no-new-privileges:true" in found["HostConfig"]["SecurityOpt"]
        assert found["HostConfig"]["Memory"] > 0
        assert found["State"]["Health"]["Status"] == "healthy"
    say("both containers: no root, no capabilities, read-only file system, memory limit")


def test_the_examples_of_the_readme_work(deployment: Deployment) -> None:
    scripts = [text for language, text in blocks("README.md") if language == "sh"]
    replies = [run(script, deployment.url) for script in scripts]
    assert [reply.get("position") for reply in replies[:4]] == [4, 6, 6, 6]
    assert [reply.get("replayed") for reply in replies[:3]] == [False, False, True]
    assert replies[3]["code"] == "position_ahead"
    say(f"the README's {len(replies)} examples: as it says")


def test_a_replay_succeeds_while_containers_restart(deployment: Deployment, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [
        *(sys.executable, "-m", "carry.cli", "replay"),
        # at least a minute, by the events' times: four restarts take 20 s, on a busy machine longer
        *("--url", deployment.url, "--prefix", "replay-", "--events", "40000", "--speed", "60000"),
        *("--chunk", "1..16", "--verify"),
        *("--patience-s", "300"),
        *("--report", str(report), "--quiet"),
    ]
    replay = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for service, reached in (
            ("carry", 2000),
            ("redis", 4000),
            ("redis", 6000),
            ("carry", 6000),
        ):
            wait_for_events(deployment, replay, reached)
            deployment.restart(service)
        output, errors = replay.communicate(timeout=400)
    finally:
        if replay.poll() is None:
            replay.send_signal(signal.SIGINT)
            replay.communicate()
    assert replay.returncode == 0, output + errors
    assert report.exists()
    say("replayed 40,000 events while both containers restarted; verified:")
    for line in output.splitlines():
        say(f"  {line}")


def test_scaled_services_behind_haproxy_restart_without_a_failed_request(
    deployment: Deployment,
) -> None:
    port = free_port()
    began_s = time.monotonic()
    # the check of HAProxy fails after two seconds
    settings = {"CARRY_PORT": "0", "CARRY_PROXY_PORT": str(port), "CARRY_LAME_DUCK_S": "3"}
    first, second = deployment.scale(2, **settings)
    say(f"two services behind HAProxy ready after {time.monotonic() - began_s:.1f} s")
    url = f"http://127.0.0.1:{port}"
    with feeding(url, MODEL, {"events": EVENTS}) as feeders:
        feeders.wait_for_more()
        subprocess.run(["docker", "restart", first], capture_output=True, check=True)
        healthy = lambda: deployment.inspect(first)["State"]["Health"]["Status"] == "healthy"  # noqa: E731
        until(healthy, "the restarted service", READY_S, 0.2)
        since = deployment.inspect(first)["State"]["StartedAt"]
        until(lambda: has_chunks(first, since), "chunks of the restarted service", READY_S, 0.2)
        subprocess.run(["docker", "stop", second], capture_output=True, check=True)
        feeders.wait_for_more()
    say(f"0 of {feeders.chunks} requests failed while one restarted and then the other stopped")


def has_chunks(container: str, since: str) -> bool:
    """Whether HAProxy has sent a service chunks, as its log says, since it was started."""
    command = ["docker", "logs", "--since", since, container]
    logged = subprocess.run(command, capture_output=True, text=True, check=True)
    route = '"route":"/v1/models/{model}/streams/{stream}/chunks"'
    return route in logged.stdout + logged.stderr


def wait_for_events(deployment: Deployment, replay: subprocess.Popen[str], count: int) -> None:
    """Until the running container has processed so many events of the replay."""
    counted = re.compile(rf'^carry_events_total{{model="{MODEL}"}} (\S+)$', re.MULTILINE)
    while replay.poll() is None:
        found = counted.search(httpx.get(f"{deployment.url}/metrics", timeout=60).text)
        if found and float(found[1]) >= count:
            return
    pytest.fail("the replay ended early: " + "".join(replay.communicate()))
