"""Rolling restart of two services behind HAProxy, with the configuration that is shipped."""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from tests.support.needs import needs_tools
from tests.support.pages import ROOT
from tests.support.pipelines import make_artifact
from tests.support.servers import free_port, real_server, until
from tests.support.service import POLL_S, Service, running

pytestmark = needs_tools("haproxy")

ENVIRONMENT = {"CARRY_LAME_DUCK_S": "4", "CARRY_KEEP_ALIVE_S": "10"}
CLIENTS = 4
PACE_S = 0.004
"""Pause between chunks: the test is about requests during a restart, not about load."""


class Feeder(threading.Thread):
    """Sends the chunks of one stream in order, without a retry, until it is stopped."""

    def __init__(self, url: str, stream: str):
        super().__init__(daemon=True)
        self._url = f"{url}/v1/models/probe/streams/{stream}"
        self.problems: list[Any] = []
        self.position = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self.stopped.wait(PACE_S):
                chunk = {"inputs": [[0.5] * 3] * 2, "position": self.position}
                try:
                    answer = client.post(f"{self._url}/chunks", json=chunk)
                except httpx.HTTPError as error:
                    self.problems.append(error)
                    return
                if answer.status_code != 200:
                    self.problems.append(answer.text)
                    return
                self.position = answer.json()["position"]


def test_rolling_restart_behind_a_load_balancer_fails_no_request(tmp_path: Path) -> None:
    models = make_artifact(tmp_path / "models").path
    with ExitStack() as stack:
        store = stack.enter_context(real_server("valkey"))
        services = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            port = free_port()
            service = running(
                tmp_path / name, models, "--port", str(port), redis_url=store.url, **ENVIRONMENT
            )
            services.append(stack.enter_context(service))
        url = f"http://127.0.0.1:{free_port()}"
        addresses = [each.url.removeprefix("http://") for each in services]
        names = ("BIND", "SERVICE_ONE", "SERVICE_TWO")
        balancer = subprocess.Popen(
            ["haproxy", "-db", "-f", str(ROOT / "deploy" / "haproxy" / "haproxy.cfg")],
            env={**os.environ, **dict(zip(names, (url[7:], *addresses), strict=True))},
        )
        stack.callback(balancer.wait)
        stack.callback(balancer.terminate)
        until(lambda: _answers(url), "the load balancer", poll_s=POLL_S)
        feeders = [Feeder(url, f"s{index}") for index in range(CLIENTS)]
        for feeder in feeders:
            feeder.start()
        for service in services:
            _restart(service, feeders)
        _more_chunks(feeders)
        for feeder in feeders:
            feeder.stopped.set()
            feeder.join()
        assert [feeder.problems for feeder in feeders] == [[]] * CLIENTS


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready").status_code == 200
    except httpx.HTTPError:
        return False


def _restart(service: Service, feeders: list[Feeder]) -> None:
    """Replace a service once the load balancer has both, and until it has both again."""
    _more_chunks(feeders)
    assert service.stop() == 0
    service.start(**ENVIRONMENT)
    until(lambda: '"route":"/v1/models/{model}/streams/{stream}/chunks"' in service.log(), "chunks")


def _more_chunks(feeders: list[Feeder]) -> None:
    before = [feeder.position for feeder in feeders]
    until(
        lambda: all(
            feeder.problems or feeder.position > start + 10
            for feeder, start in zip(feeders, before, strict=True)
        ),
        "more chunks",
    )
