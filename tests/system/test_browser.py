"""A page in Chromium: the documented client of a WebSocket, a watch, and a page of another origin.

The browser is driven by its DevTools protocol.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.support.needs import needs_tools
from tests.support.pages import ROOT, blocks
from tests.support.servers import until
from tests.support.service import Service

BROWSER = "chromium"

pytestmark = needs_tools("chromium")

PAGE = "docs/how-to/stream-over-a-websocket.md"
EVENTS = json.loads((ROOT / "examples/departures.json").read_bytes())["EWR-UA"]
STREAM = "/v1/models/flights/streams/of-a-page"

FEED = """
new Promise((resolve, reject) => {
  const replies = [], outputs = [], events = EVENTS;
  const watch = new EventSource("STREAM/outputs");
  const done = () => { if (replies.length + outputs.length === 2 * events.length) {
    watch.close(); resolve({ replies, outputs }); } };
  watch.addEventListener("outputs", ({ data }) => { outputs.push(JSON.parse(data)); done(); });
  watch.addEventListener("stream", () => {
    let send;
    const url = location.origin.replace("http", "ws") + "STREAM/live";
    if (outputs.length + replies.length) return;
    send = open(url, (reply) => { replies.push(reply); done(); });
    setTimeout(() => events.forEach((event) => send([event])), 500);
  }, { once: true });
  setTimeout(() => reject(new Error("too late: " + replies.length + " " + outputs.length)), 20000);
})
"""

REFUSED = """
new Promise((resolve) => {
  const socket = new WebSocket("URL");
  socket.onopen = () => resolve("open");
  socket.onclose = ({ code }) => resolve(code);
})
"""


class Page:
    """One page of a browser."""

    def __init__(self, connection: ClientConnection):
        self._connection = connection
        self._last = 0

    async def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the DevTools protocol; its result."""
        self._last += 1
        await self._connection.send(
            json.dumps({"id": self._last, "method": method, "params": parameters})
        )
        async for message in self._connection:
            answer = json.loads(message)
            if answer.get("id") == self._last:
                return answer["result"]
        raise AssertionError("the browser ended")

    async def open(self, url: str) -> None:
        """Go to a page."""
        await self.call("Page.enable")
        await self.call("Page.navigate", url=url)
        async for message in self._connection:
            if json.loads(message).get("method") == "Page.loadEventFired":
                return

    async def evaluate(self, script: str) -> Any:
        """The value, or the resolved promise, of a script."""
        result = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")


@pytest.fixture
def port(tmp_path: Path) -> Iterator[str]:
    """The debugging port of a headless browser with a profile of its own."""
    process = subprocess.Popen(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
            f"--user-data-dir={tmp_path}", "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    # written once the browser listens
    file = tmp_path / "DevToolsActivePort"
    try:
        yield until(lambda: file.exists() and file.read_text(), "a browser").splitlines()[0]
    finally:
        process.terminate()
        process.wait()


@asynccontextmanager
async def page_of(port: str) -> AsyncIterator[Page]:
    """The one page of a browser."""
    async with httpx.AsyncClient() as client:
        pages = (await client.get(f"http://127.0.0.1:{port}/json")).json()
    address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
    async with connect(address, max_size=None) as connection:
        yield Page(connection)


async def test_a_page_feeds_and_watches_a_stream(service: Service, port: str) -> None:
    async with asyncio.timeout(60), page_of(port) as page:
        async with httpx.AsyncClient(base_url=service.url) as client:
            await client.delete(STREAM)
            whole = await client.post(STREAM + "-whole/chunks", json={"events": EVENTS})
            expected = whole.json()["outputs"]["late"]
            await client.delete(STREAM + "-whole")
        await page.open(service.url + "/docs/errors")
        (script, *_) = (text for language, text in blocks(PAGE) if language == "js")
        definition, _, _ = script.partition("const send")
        await page.evaluate(definition)
        feed = FEED.replace("STREAM", STREAM).replace("EVENTS", json.dumps(EVENTS))
        got = await page.evaluate(feed)
        for documents in (got["replies"], got["outputs"]):
            assert [each["position"] for each in documents] == [*range(1, len(EVENTS) + 1)]
            outputs = [each["outputs"]["late"][0] for each in documents]
            np.testing.assert_allclose(outputs, expected, atol=1e-5)
        await page.open("data:text/html,a page of nobody")
        refused = REFUSED.replace("URL", service.url.replace("http", "ws") + STREAM + "/live")
        assert await page.evaluate(refused) == 1006
