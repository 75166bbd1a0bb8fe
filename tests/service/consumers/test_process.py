"""`carry consume` as its users run it: processes that are stopped, suspended and killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models.artifact.artifact import Artifact
from tests.support.command import carry
from tests.support.consumers import add, consumer_processes, fields_of
from tests.support.metrics import read, series
from tests.support.pipelines import rows_of
from tests.support.servers import RealServer, until

RANDOM = np.random.default_rng(7)
SECRET = "whsec_" + "A" * 44
WEBHOOK = "model: probe\nfrom: a\nto: b\ncreate: true\nwebhook: {url: http://h, "


@pytest.fixture
def start(server: RealServer, artifact: Artifact, tmp_path: Path) -> Iterator[Any]:
    """Starts consumers, with a short lease."""
    config = "model: probe\nfrom: events\nto: scores\nlease_s: 0.5\n"
    (tmp_path / "consumer.yaml").write_text(config)
    with consumer_processes(server, artifact, tmp_path) as start_one:
        yield start_one


def test_health_metrics_status_and_graceful_stop(
    server: RealServer, client: Any, start: Any
) -> None:
    add(client, "events", *[fields_of("a", row) for row in rows_of(RANDOM, 5)])
    consumer = start("--port", "0")
    port = consumer.wait_for("port_bound")["port"]
    consumer.wait_for("topic_acquired")
    until(lambda: client.xlen("scores") == 5, "the outputs")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        assert http.get("/health/live").status_code == 200
        ready = http.get("/health/ready")
        assert (ready.status_code, ready.json()["failing"]) == (200, [])
        committed = series("carry_consumer_events_total", topic="events", result="committed")
        until(
            lambda: read(http.get("/metrics").content).get(committed) == 5, "the metric", poll_s=0.1
        )
    shown = carry("consume", "status", "--from", "events", "--redis-url", server.url)
    assert shown.exit_code == 0
    columns = shown.stdout.decode().splitlines()[1].split()
    assert (columns[0], columns[2:]) == ("events", ["5", "0", "0", "-", "0/s"])
    consumer.fork.send_signal(signal.SIGTERM)
    assert consumer.fork.wait(60) == 0
    assert consumer.lines()[-1]["message"] == "stopped"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: probe\nfrom: events\nto: scores\nfrm: x\n", "frm: expected a member among"),
        (f"model: probe\nfrom: a\nto: b\nsecret: {SECRET}\n", "secret: expected a member among"),
        (
            "model: probe\nfrom: a\nto: b\nstream: {feild: x}\n",
            "stream.feild: expected a member among constant, field, key",
        ),
        (
            f"{WEBHOOK}secret: {SECRET}, heders: {{}}}}",
            "webhook.heders: expected a member among batch, ca_file, delete, headers",
        ),
        (f"{WEBHOOK}secret: {{var: x}}}}", "Secret.var: expected a member among env, file"),
        ("model: probe\nfrom: events\n", "to: field required"),
        ("model: probe\nfrom: events\nto: scores\nlease_s: 0\n", "lease_s: input should be"),
        ("model: other\nfrom: events\nto: scores\n", "model: expected one of probe"),
        ("- a\n", "expected a mapping, got list"),
        ("a: [", "expected YAML"),
        (
            "model: probe\nfrom: events\nto: scores\nstream: {}\n",
            "stream: expected `key`, or a mapping",
        ),
        ("model: probe\nfrom: nothing\nto: scores\n", "expected a stream 'nothing'"),
        ("model: probe\nfrom: a\nto: a\n", "expected different topics, got 'a', 'a' and 'a:dead'"),
        ("model: probe\nfrom: a\nto: b\ndead_letters: a\n", "expected different topics"),
        ("model: probe\nfrom: a\nto: b\nstream: x\n", "stream: expected a mapping of constant,"),
        ("model: probe\nfrom: a/b\nto: b\nstream: key\n", "from: expected with `stream: key` 1 to"),
        (f"{WEBHOOK}secret: x}}", "webhook.secret: expected whsec_ and at least 24 bytes"),
        (f"{WEBHOOK}secret: {{env: NO_SUCH}}}}", "webhook.secret: expected the variable NO_SUCH"),
        (f"{WEBHOOK}secret: {{file: /none}}}}", "webhook.secret: /none cannot be read"),
        (f"{WEBHOOK}secret: {SECRET}}}\nkeep: 9", "keep: expected 0 with `webhook`"),
        (f"{WEBHOOK}secret: {SECRET}, ca_file: /none}}", "webhook.ca_file: /none: "),
        (
            f"{WEBHOOK}secret: {SECRET}, headers: {{a: \u00e9}}}}",
            "webhook.headers.a: expected print",
        ),
        (
            f"{WEBHOOK}secret: {SECRET}, headers: {{'a b': c}}}}",
            "webhook.headers.a b.[key]: string",
        ),
        (f"{WEBHOOK}secret: {SECRET}, batch: 0}}", "webhook.batch: input should be greater"),
        (
            WEBHOOK.replace("http://h", "ftp://h") + "secret: x}",
            "webhook.url: URL scheme should be",
        ),
        (
            WEBHOOK.replace("http://h", "http://h:99999") + "secret: x}",
            "webhook.url: input should be a",
        ),
        (
            f"model: a\nfrom: b\nto: c\nkafka: {{sasl.password: {{value: {SECRET}}}}}\n",
            "kafka.sasl.password.Secret.value: expected a member",
        ),
        (f"model: a\nfrom: kafka://a:{SECRET}@b/c\nto: d\n", "expected kafka://HOST:PORT"),
    ],
)
def test_an_invalid_configuration_is_an_error_with_its_place(
    server: RealServer, client: Any, artifact: Artifact, tmp_path: Path, text: str, message: str
) -> None:
    config = tmp_path / "consumer.yaml"
    config.write_text(text)
    words = ("--redis-url", server.url, "--models", str(artifact.path))
    result = carry("consume", str(config), *words)
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("carry: ")
    assert message in error
    assert SECRET not in error
