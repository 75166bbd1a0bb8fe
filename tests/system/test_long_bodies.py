"""Expensive bodies are rejected in bounded memory, while other requests are answered.

A health check waits for at most the work on one body: alone, some 40 ms of processor time.
"""

from __future__ import annotations

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.service.transports.v1.corpus.bodies.huge import ATTACK, HUGE, MAX_BYTES, HugeBody
from tests.support.responsiveness import Health, Memory
from tests.support.servers import until
from tests.support.service import Service, running

MOST_WORK_S = 0.2
"""Processor time that a health check may wait for; on a busy machine the same work takes more."""

MOST_MEMORY = 96 * 2**20
"""Bytes that a rejected body of 2 MiB may take while it is decoded: a list of two characters is an
object of 56 bytes."""


def send(url: str, body: HugeBody, content: bytes) -> tuple[int, dict[str, Any]]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        headers = {"content-type": body.media, "accept": "application/json"}
        connection.request(body.method, body.path, content, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def rejected(answer: dict[str, Any]) -> set[str]:
    """The code of a problem, or those of all items."""
    results = answer.get("results")
    return {answer["code"]} if results is None else {item["error"]["code"] for item in results}


@pytest.mark.parametrize("body", HUGE, ids=lambda body: f"{body.media[12:]}-{body.name}")
def test_a_huge_body_is_rejected_while_other_requests_are_served(
    service: Service, body: HugeBody
) -> None:
    content = body.make()
    assert 0.9 * MAX_BYTES < len(content) <= MAX_BYTES
    assert service.process is not None
    memory = Memory(service.process.pid)
    with Health(service.url, [service.process.pid]).watched() as health:
        status, answer = send(service.url, body, content)
    assert (status, rejected(answer)) == (body.status, {body.code})
    assert not health.failures
    assert health.most_work_s < MOST_WORK_S
    assert memory.growth <= MOST_MEMORY


@pytest.mark.parametrize("name", ["one string", "one name"])
def test_rejected_bodies_do_not_stay_in_memory(service: Service, name: str) -> None:
    """An error that refers to itself would keep its body until the garbage collector runs."""
    [body] = [each for each in HUGE if each.name == name]
    content = body.make()
    assert service.process is not None
    send(service.url, body, content)
    memory = Memory(service.process.pid)
    for _ in range(100):
        assert send(service.url, body, content)[0] == body.status
    assert memory.growth <= MOST_MEMORY


def test_eight_concurrent_huge_bodies_are_rejected(tmp_path: Path, model_dir: Path) -> None:
    bodies = [*ATTACK, *ATTACK][:8]
    contents = {body.name: body.make() for body in ATTACK}
    with running(tmp_path, model_dir, "--workers", "2") as service:
        workers = until(lambda: service.ready_workers()[1:] and service.ready_workers(), "both")
        with (
            Health(service.url, workers).watched() as health,
            ThreadPoolExecutor(len(bodies)) as pool,
        ):
            sent = [pool.submit(send, service.url, body, contents[body.name]) for body in bodies]
            answers = [each.result() for each in sent]
    for body, (status, answer) in zip(bodies, answers, strict=True):
        assert (status, rejected(answer)) == (body.status, {body.code})
    assert not health.failures
    assert health.answers > 0
    assert health.most_work_s < 4 * MOST_WORK_S
