"""Chromium without a window, driven by its DevTools protocol."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

from tests.support.servers import until, until_async

BROWSER = "chromium"

_LOW_CONTRAST = """
(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) =>
    0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const color = parse(getComputedStyle(element).backgroundColor);
      if (color[3] !== 0) return color;
    }
  };
  const low = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest(":disabled")) continue;
    const [one, other] = [parse(getComputedStyle(element).color), behind(element)].map(luminance);
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) low.push([texts.currentNode.data, contrast]);
  }
  return low;
})()
"""
"""Texts with a contrast below 4.5 (WCAG 2, level AA); disabled controls are exempt."""

_NAMED = {"button", "link", "searchbox", "textbox", "image", "img", "dialog", "navigation"}
"""Roles of controls, images and landmarks, which need a name for screen readers."""


class Page:
    """One page of a browser.

    Attributes:
        errors: exceptions and errors on its console, except for requests that got no answer.
    """

    def __init__(self, connection: ClientConnection):
        self.errors: list[Any] = []
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
            self._record(answer)
            if answer.get("id") == self._last:
                return answer["result"]
        raise AssertionError("the browser ended")

    async def open(self, url: str) -> None:
        """Go to a page."""
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        async for message in self._connection:
            event = json.loads(message)
            self._record(event)
            if event.get("method") == "Page.loadEventFired":
                return

    async def evaluate(self, script: str) -> Any:
        """The value, or the resolved promise, of a script."""
        result = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, script: str) -> Any:
        """Wait until a script has a true value, and return it."""
        return await until_async(lambda: self.evaluate(script), script)

    async def press(self, key: str, text: str = "") -> None:
        """Press a key, which may type a text."""
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, text=text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    async def assert_accessible(self) -> None:
        """Check the contrast of texts, and that everything that needs a name has one."""
        assert await self.evaluate(_LOW_CONTRAST) == []
        tree = (await self.call("Accessibility.getFullAXTree"))["nodes"]
        nodes = [node for node in tree if not node["ignored"]]
        named = [node for node in nodes if node.get("role", {}).get("value") in _NAMED]
        assert [node for node in named if not node.get("name", {}).get("value")] == []

    def _record(self, message: Any) -> None:
        parameters = message.get("params", {})
        entry = parameters.get("entry", {})
        is_error = message.get("method") == "Runtime.exceptionThrown"
        is_error |= parameters.get("type") == "error"
        is_error |= entry.get("level") == "error" and entry["source"] != "network"
        if is_error:
            self.errors.append(parameters)


@contextmanager
def running_browser(profile: Path) -> Iterator[str]:
    """The address of a new browser's debugger.

    Args:
        profile: an empty folder.
    """
    process = subprocess.Popen(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
            f"--user-data-dir={profile}", "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    # written once the browser listens
    file = profile / "DevToolsActivePort"

    def port() -> str:
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        return file.read_text().partition("\n")[0] if file.exists() else ""

    try:
        yield f"http://127.0.0.1:{until(port, 'a browser')}"
    finally:
        process.terminate()
        process.wait()


@asynccontextmanager
async def new_page(browser: str) -> AsyncIterator[Page]:
    """A new page of a browser."""
    async with httpx.AsyncClient(base_url=browser) as client:
        target = (await client.put("/json/new")).json()
        try:
            async with connect(target["webSocketDebuggerUrl"], max_size=None) as connection:
                yield Page(connection)
        finally:
            await client.get(f"/json/close/{target['id']}")
