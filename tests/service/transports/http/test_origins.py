"""Pages of other sites: what their browser sends changes no stream of a service without keys."""

from __future__ import annotations

import pytest

from tests.service.transports.http.harness import Harness, problem, rows

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
