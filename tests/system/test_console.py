"""The console in Chromium, against a running service: what a user sees, in both themes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.browser import new_page
from tests.support.needs import needs_tools
from tests.support.pages import ROOT
from tests.support.proxy import Proxy
from tests.support.servers import until_async
from tests.support.service import Service

pytestmark = needs_tools("chromium")

EVENTS = json.loads((ROOT / "examples/departures.json").read_bytes())["EWR-UA"]
STREAM = "/v1/models/flights/streams/console-b"
VIEWS = ("#/", "#/models/flights", "#/models/flights/streams/console-b")

TEXT = "document.querySelector('main')?.innerText"
TILE = """[...document.querySelectorAll('dt')]
  .find((each) => each.innerText === {!r})?.nextSibling.innerText"""
LEGEND = """[...document.querySelectorAll('figure')]
  .find((each) => each.querySelector('h3').innerText === {!r})
  ?.querySelector('[role=img]').ariaLabel.split('latest: ')[1]"""


async def test_the_console_shows_streams_as_they_change(service: Service, browser: str) -> None:
    up = True
    host, _, port = service.url.removeprefix("http://").partition(":")
    proxy = Proxy(lambda: (host, int(port)) if up else None)
    async with (
        asyncio.timeout(90),
        proxy.listening(),
        httpx.AsyncClient(base_url=service.url) as client,
        new_page(browser) as page,
    ):

        async def send(stream: str, *events: Any) -> dict[str, Any]:
            reply = await client.post(
                f"/v1/models/flights/streams/{stream}/chunks", json={"events": events}
            )
            return reply.json()

        for stream in ("console-a", "console-b", "console-c"):
            await client.delete(f"/v1/models/flights/streams/{stream}")
            await send(stream, *EVENTS[:2])
        await send("console-a", {"departed": 7})
        await page.open(f"http://127.0.0.1:{proxy.port}/console/#/models/flights")

        # by keyboard: past the button that loads a version to the search, a prefix, to the stream
        await page.until(f"{TEXT}?.includes('console-') && {TEXT}.includes('Load')")
        await page.evaluate("document.querySelector('main').focus()")
        for key in ("Tab", "Tab"):
            await page.press(key)
        assert await page.evaluate("document.activeElement.labels[0].innerText")
        await page.call("Input.insertText", text="console-b")
        await page.until(f"!{TEXT}.includes('console-c') && {TEXT}.includes('console-b')")
        for key in ("Tab", "Tab"):
            await page.press(key)
        await page.press("Enter", "\r")

        # one stream live
        await page.until("document.querySelector('h1 [role=status]')?.innerText === 'Live'")
        for position, event in enumerate(EVENTS[2:4], 3):
            late = (await send("console-b", event))["outputs"]["late"][0]
            await page.until(f"{TILE.format('Position')} === '{position}'")
            shown = await page.until(LEGEND.format("late"))
            assert float(shown.removeprefix("late ")) == pytest.approx(late, rel=0.01)
            await page.until(f"{TILE.format('Lag, in steps')} === '0'")
        state = (await client.get(f"{STREAM}/state")).json()["state"]
        norms = {name: np.linalg.norm(part) for name, part in state.items() if np.ndim(part)}

        async def shows_norms() -> bool:
            shown = await page.until(LEGEND.format("State"))
            parts = [each.split(" ") for each in shown.split(", ")]
            return {name: float(norm) for name, norm in parts} == pytest.approx(
                {name: norms[name] for name, _ in parts}, rel=0.005
            )

        await until_async(shows_norms, "the norms of the state")

        # every view in both themes
        for theme in ("light", "dark"):
            await page.call(
                "Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": theme}],
            )
            for view in VIEWS:
                await page.evaluate(f"location.hash = '{view}'")
                await page.until("document.querySelectorAll('main td, main figure').length > 1")
                await page.assert_accessible()
        color = "getComputedStyle(document.body.parentElement).backgroundColor"
        dark = await page.evaluate(color)
        await page.evaluate("document.querySelector('header button:last-of-type').click()")
        assert await page.evaluate(color) != dark

        # errors, and a service that stops and comes back
        await page.evaluate("location.hash = '#/'")
        await page.until(f"/invalid_input.*[1-9]/.test({TEXT})")
        await page.evaluate(f"location.hash = '{VIEWS[2]}'")
        await page.until("document.querySelector('h1 [role=status]')?.innerText === 'Live'")
        up = False
        for connection in list(proxy.connections):
            connection.abort()
        await page.until(
            "document.querySelector('header [role=status]')?.innerText === 'No answer'"
        )
        assert "does not answer" in await page.until(
            "document.querySelector('main [role=alert]')?.innerText"
        )
        up = True
        await page.until("document.querySelector('header [role=status]')?.innerText === 'Ready'")
        await page.until("document.querySelector('h1 [role=status]')?.innerText === 'Live'")
        await send("console-b", EVENTS[4])
        await page.until(f"{TILE.format('Position')} === '5'")
        assert page.errors == []
