"""The console's page: its headers, its assets, and where it is served."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from service.console.page import ASSETS, add_console


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    add_console(app)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://carry") as client:
        yield client


async def test_every_asset_of_the_page_is_served_and_cached_as_immutable(
    client: httpx.AsyncClient,
) -> None:
    page = await client.get("/console/")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["cache-control"] == "no-cache"
    names = set(re.findall(r'(?:href|src)="(?!data:)([^"]*)"', page.text))
    assert names == {path.name for path in ASSETS.iterdir()} - {"index.html"}
    types = set()
    for name in names:
        asset = await client.get(f"/console/{name}")
        assert asset.content == (ASSETS / name).read_bytes()
        assert asset.headers["cache-control"] == "public, max-age=31536000, immutable"
        types.add(asset.headers["content-type"].partition(";")[0])
    assert types == {"text/css", "text/javascript", "text/plain"}


async def test_the_page_may_load_from_its_own_host_only(client: httpx.AsyncClient) -> None:
    policy = (await client.get("/console/")).headers["content-security-policy"]
    directives = dict(each.split(" ", 1) for each in policy.split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["frame-ancestors"] == "'none'"
    assert directives.pop("require-trusted-types-for") == "'script'"
    assert set(directives.values()) == {"'none'", "'self'", "'self' data:"}


async def test_page_with_matching_etag_is_answered_304(client: httpx.AsyncClient) -> None:
    etag = (await client.get("/console/")).headers["etag"]
    assert (await client.get("/console/", headers={"if-none-match": etag})).status_code == 304
    assert (await client.get("/console/", headers={"if-none-match": '"other"'})).status_code == 200


async def test_addresses_outside_of_the_assets_are_not_found(client: httpx.AsyncClient) -> None:
    for name in ("page.py", "..%2Fpage.py", "index.html", "%2e%2e/page.py"):
        assert (await client.get(f"/console/{name}")).status_code == 404
    redirect = await client.get("/console")
    assert (redirect.status_code, redirect.headers["location"]) == (308, "console/")
