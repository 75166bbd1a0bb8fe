"""Services behind HAProxy, with the configuration that is shipped: rolling restart, TLS."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from websockets.asyncio.client import connect

from tests.support.browser import new_page
from tests.support.certificates import Certificates, certificates
from tests.support.feeders import Feeders, feeding
from tests.support.needs import needs_tools
from tests.support.pages import ROOT
from tests.support.pipelines import make_artifact
from tests.support.post_tables import INPUT, LSTM_OUTPUTS, PRINTED
from tests.support.servers import free_port, real_server, until
from tests.support.service import POLL_S, READY_S, Service, running

__all__ = ["certificates"]
pytestmark = needs_tools("haproxy", "curl")

ENVIRONMENT = {"CARRY_LAME_DUCK_S": "4", "CARRY_KEEP_ALIVE_S": "10"}


@contextmanager
def balancer(folder: Path, **environment: str) -> Iterator[str]:
    """HAProxy with the shipped configuration; yields its URL. Its log is in `haproxy.log`."""
    certificate = environment.get("CERTIFICATE")
    address = f"127.0.0.1:{free_port()}"
    url = f"{'https' if certificate else 'http'}://{address}"
    trusted = ssl.create_default_context(cafile=certificate) if certificate else False
    with (folder / "haproxy.log").open("wb") as output:
        process = subprocess.Popen(
            ["haproxy", "-db", "-f", str(ROOT / "deploy" / "haproxy" / "haproxy.cfg")],
            env={**os.environ, "BIND": address, **environment},
            stdout=output,
        )
    try:

        def answers_or_ended() -> bool:
            return process.poll() is not None or _answers(url, trusted)

        until(answers_or_ended, "the load balancer", poll_s=POLL_S)
        assert process.poll() is None, (folder / "haproxy.log").read_text()
        yield url
    finally:
        process.terminate()
        process.wait()


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
        one, two = (each.url.removeprefix("http://") for each in services)
        url = stack.enter_context(balancer(tmp_path, SERVICE_ONE=one, SERVICE_TWO=two))
        with feeding(url) as feeders:
            for service in services:
                _restart(service, feeders)
            _reload(services[0], feeders)
        for service in services:
            service.kill()  # at once, not as a lame duck
        print(f"  0 of {feeders.chunks} requests failed while services restarted and reloaded")


@pytest.fixture(scope="module")
def gateway(
    service: Service, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """HAProxy with TLS in front of a service."""
    folder = tmp_path_factory.mktemp("gateway")
    pem = folder / "service.pem"
    pem.write_bytes(
        b"".join(
            each.read_bytes()
            for each in (certificates.key, certificates.certificate, certificates.authority)
        )
    )
    http, grpc = service.url.removeprefix("http://"), service.grpc_address()
    addresses = {"SERVICE_ONE": http, "SERVICE_TWO": http, "GRPC_ONE": grpc, "GRPC_TWO": grpc}
    with balancer(folder, CERTIFICATE=str(pem), **addresses) as url:
        yield Gateway(url, certificates.authority, folder / "haproxy.log")


@dataclass(frozen=True, slots=True)
class Gateway:
    """A load balancer with TLS, the authority of its certificate, and its log."""

    url: str
    authority: Path
    log: Path


def assert_outputs(reply: Any) -> None:
    """Every output of the reply to INPUT is as printed."""
    (outputs,) = reply["outputs"].values()
    np.testing.assert_allclose(np.squeeze(outputs), LSTM_OUTPUTS, atol=PRINTED)


def test_gateway_speaks_http2_and_logs_the_address_and_id_of_a_request(gateway: Gateway) -> None:
    url = f"{gateway.url}/v1/models/post-lstm/streams/http2/chunks"
    chunk = json.dumps({"inputs": [[value] for value in INPUT], "position": 0})
    done = subprocess.run(
        [
            *("curl", "--silent", "--show-error", "--http2", "--cacert", str(gateway.authority)),
            *("--json", chunk, "--header", "x-request-id: through-the-gateway"),
            *("--write-out", "\n%{http_version} %{http_code}", url),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    reply, outcome = done.stdout.splitlines()
    assert outcome == "2 200", reply
    assert_outputs(json.loads(reply))
    (line,) = until(
        lambda: [
            each for each in gateway.log.read_text().splitlines() if "through-the-gateway" in each
        ],
        "the line of the request",
    )
    assert line.startswith("127.0.0.1:")
    assert "carry~ services/" in line


def test_gateway_routes_grpc(gateway: Gateway) -> None:
    rows = np.array(INPUT, np.float32).reshape(1, -1, 1)
    tensor = triton.InferInput("inputs", rows.shape, "FP32")
    tensor.set_data_from_numpy(rows)
    address = gateway.url.removeprefix("https://")
    with triton.InferenceServerClient(
        address, ssl=True, root_certificates=str(gateway.authority)
    ) as client:
        assert client.is_server_ready()
        result = client.infer("post-lstm", [tensor], sequence_id="grpc", sequence_start=True)
    outputs = result.as_numpy("output")
    np.testing.assert_allclose(np.squeeze(outputs), LSTM_OUTPUTS, atol=PRINTED)


async def test_gateway_passes_websockets_of_pages_of_its_own_host(gateway: Gateway) -> None:
    trusted = ssl.create_default_context(cafile=gateway.authority)
    url = f"{gateway.url.replace('https', 'wss')}/v1/models/post-lstm/streams/socket/live"
    # not the library's client with threads: one that reads a TLS socket while another writes to it
    # can lose the request (CPython's issue 77271)
    async with (
        asyncio.timeout(60),
        connect(url, ssl=trusted, origin=gateway.url, proxy=None) as socket,  # type: ignore[arg-type]
    ):
        assert json.loads(await socket.recv())["hello"]["position"] == 0
        await socket.send(json.dumps({"inputs": [[value] for value in INPUT], "position": 0}))
        reply = json.loads(await socket.recv())["reply"]
    assert_outputs(reply)


OPEN_SOCKET = """
new Promise((resolve, reject) => {
  const url = location.origin.replace("https", "wss") + "/v1/models/post-lstm/streams/page/live";
  const socket = new WebSocket(url);
  socket.onmessage = ({ data }) => resolve(JSON.parse(data).hello.position);
  socket.onclose = ({ code }) => reject(new Error("closed: " + code));
})
"""


@needs_tools("chromium")
async def test_gateway_serves_a_page_over_http2_and_its_websocket(
    gateway: Gateway, browser: str
) -> None:
    """Chromium may open the socket on the connection of the page (RFC 8441)."""
    async with asyncio.timeout(60), new_page(browser) as page:
        await page.call("Security.setIgnoreCertificateErrors", ignore=True)
        await page.open(f"{gateway.url}/docs/errors")
        entry = "performance.getEntriesByType('navigation')[0].nextHopProtocol"
        assert await page.evaluate(entry) == "h2"
        assert await page.evaluate(OPEN_SOCKET) == 0


class Echo(BaseHTTPRequestHandler):
    """Answers with the headers of the request."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(self.headers.items()).encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_gateway_forwards_the_clients_address_and_drops_forged_headers(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as echo:
        threading.Thread(target=echo.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{echo.server_port}"
        with balancer(tmp_path, SERVICE_ONE=address, SERVICE_TWO=address) as url:
            claims = {"X-Forwarded-For": "192.0.2.7", "X-Forwarded-Proto": "https"}
            sent = httpx.get(f"{url}/v1/models", headers=claims).json()
        echo.shutdown()
    forwarded = [(name.lower(), value) for name, value in sent if name.lower().startswith("x-f")]
    assert forwarded == [("x-forwarded-for", "127.0.0.1"), ("x-forwarded-proto", "http")]


def _answers(url: str, trusted: ssl.SSLContext | bool) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", verify=trusted).status_code == 200
    except httpx.HTTPError:
        return False


def _restart(service: Service, feeders: Feeders) -> None:
    """Restart a service once the load balancer has both, and until it has both again."""
    feeders.wait_for_more()
    assert service.stop() == 0
    service.start(**ENVIRONMENT)
    until(lambda: '"route":"/v1/models/{model}/streams/{stream}/chunks"' in service.log(), "chunks")


def _reload(service: Service, feeders: Feeders) -> None:
    """Replace the worker of a service by SIGHUP."""
    feeders.wait_for_more()
    service.process.send_signal(signal.SIGHUP)
    until(lambda: '"message":"worker_ready"' in service.log(), "the successor", READY_S, POLL_S)
    feeders.wait_for_more()
