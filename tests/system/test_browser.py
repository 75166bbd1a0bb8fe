"""A page in Chromium: the documented client of a WebSocket, a watch, a page of another origin."""

from __future__ import annotations

import asyncio
import json

import httpx
import numpy as np

from tests.support.browser import new_page
from tests.support.needs import needs_tools
from tests.support.pages import ROOT, blocks
from tests.support.service import Service

pytestmark = needs_tools("chromium")

PAGE = "docs/reference/websocket.md"
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


async def test_a_page_feeds_and_watches_a_stream(service: Service, browser: str) -> None:
    async with asyncio.timeout(60), new_page(browser) as page:
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
