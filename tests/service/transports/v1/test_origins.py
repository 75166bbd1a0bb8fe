"""Pages of other sites: what their browser sends changes no stream of a service without keys.

Nor may a page that has the service's origin, since its own host name resolves to the service.
"""

from __future__ import annotations

import httpx
import pytest

from service.server.heads import host_rule
from tests.service.transports.v1.harness import Harness, problem, rows
from tests.support.service import Service

PATH = "/v1/models/probe/streams/s"
CHUNK = {"inputs": rows(1).tolist()}
OTHERS = ("https://evil.example", "http://carry.evil.example", "null")


@pytest.mark.parametrize("origin", OTHERS)
async def test_pages_of_other_sites_change_no_stream(api: Harness, origin: str) -> None:
    headers = {"origin": origin}
    await api.client.post(f"{PATH}/chunks", json=CHUNK)
    for method, path, body in (
        ("POST", f"{PATH}/chunks", CHUNK),
        ("POST", "/v1/models/probe/chunks", {"chunks": [{"stream": "s", **CHUNK}]}),
        ("POST", f"{PATH}/fork", {"to": "t"}),
        ("DELETE", PATH, None),
    ):
        reply = await api.client.request(method, path, json=body, headers=headers)
        problem(reply, 403, "origin_not_allowed")
    assert api.position("s") == 1
    assert (await api.client.get(PATH, headers=headers)).status_code == 200


async def test_pages_of_the_service_itself_may_change_streams(api: Harness) -> None:
    own = {"origin": str(api.client.base_url).rstrip("/")}
    behind_proxy = {"origin": "https://app.example.com", "sec-fetch-site": "same-origin"}
    for position, headers in enumerate((own, behind_proxy), 1):
        reply = await api.client.post(f"{PATH}/chunks", json=CHUNK, headers=headers)
        assert reply.status_code == 200
        assert api.position("s") == position
    two = [("origin", own["origin"]), ("origin", OTHERS[0])]
    reply = await api.client.post(f"{PATH}/chunks", json=CHUNK, headers=two)
    problem(reply, 403, "origin_not_allowed")


HOSTS = {
    "127.0.0.1": {
        "accepted": "localhost localhost:1 LocalHost. a.localhost:80 127.0.0.1 127.9.9.9:8 [::1]",
        "rejected": "evil.example evil.example:80 localhost.evil.example notlocalhost 127.0.0.1.b"
        " 127.evil.example 10.0.0.1 0.0.0.0 [::2] [::1 evil.example#localhost 1127.0.0.1",
    },
    "0.0.0.0": {"accepted": "localhost evil.example 10.0.0.1:8000 [fd00::1]", "rejected": ""},
}
HOSTS["::1"] = HOSTS["localhost"] = HOSTS["127.0.0.1"]


@pytest.mark.parametrize("address", HOSTS)
def test_host_names_of_a_service(address: str) -> None:
    for rule, hosts in HOSTS[address].items():
        for host in hosts.split():
            accepts = bool(host_rule(address, "")(host.encode()))
            assert accepts == (rule == "accepted"), host
    local = bool(address != "0.0.0.0")
    accepts_host = host_rule(address, "Api.Example.com, carry:8000")
    for host in ("api.example.com", "API.example.com:443", "carry:8000", "localhost:8000"):
        assert accepts_host(host.encode())
    for host in (
        "evil.example",
        "xapi.example.com",
        "api.example.com.evil",
        "apixexample.com",
        "carry",
    ):
        assert not accepts_host(host.encode())
    # those of the health checks of Kubernetes, which has no service on a loopback address
    assert bool(accepts_host(b"10.0.0.1:8000")) == bool(accepts_host(b"[fd00::1]")) == (not local)
    assert host_rule(address, "carry,*")(b"evil.example")


def test_no_route_answers_a_page_that_rebinds_its_host_name(
    service: Service, client: httpx.Client
) -> None:
    paths = (
        "/health/live", "/health/ready", "/metrics", "/docs", "/docs/errors", "/openapi.json",
        "/console/", "/v1/models", "/v1/models/post-lstm/streams", "/v2", "/v2/health/live",
        "/v1/models/post-lstm/streams/s/outputs", "/v1/models/post-lstm/streams/s/live", "/none",
    )  # fmt: skip
    port = service.url.rpartition(":")[2]
    page = {"host": f"evil.example:{port}", "origin": f"http://evil.example:{port}"}
    for path in paths:
        answer = client.get(path, headers=page)
        problem(answer, 421, "host_not_allowed")
        assert "CARRY_ALLOWED_HOSTS" in answer.json()["detail"]
    stream = "/v1/models/post-lstm/streams/rebound"
    for method, path, body in (
        ("POST", f"{stream}/chunks", CHUNK),
        ("POST", f"{stream}/fork", {"to": "t"}),
        ("PUT", f"{stream}/state", {}),
        ("DELETE", stream, None),
        ("POST", "/v2/models/post-lstm/infer", {}),
    ):
        problem(client.request(method, path, json=body, headers=page), 421, "host_not_allowed")
    assert client.get("/health/live", headers={"host": f"localhost:{port}"}).status_code == 200
