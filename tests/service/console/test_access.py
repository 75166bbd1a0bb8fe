"""The console with access keys, in Chromium: it asks for one and shows what it allows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from service.access.caller import Verb
from service.console.page import add_console
from service.pipeline.watching import Watches
from service.transports.live.watching import add_watching
from tests.service.transports.v1.harness import Harness, harness, listening
from tests.support.access import revoke
from tests.support.browser import Page, new_page
from tests.support.needs import needs_tools
from tests.support.pipelines import make_artifact
from tests.support.proxy import Proxy
from tests.support.servers import RealServer

pytestmark = needs_tools("chromium")

DIALOG = "document.querySelector('dialog')"
MAIN = "document.querySelector('main')?.innerText"
STATUS = "document.querySelector('h1 [role=status]')?.innerText"
LIST_MODELS = "document.querySelector('[data-path=\"/v1/models\"]').closest('.opblock')"
ANSWER = f"{LIST_MODELS}.querySelector('.live-responses-table')"
LOAD = "document.querySelector('main [aria-label=\"Load a version\"]')"
CHANGE = "document.querySelector('main dialog')"
ALERT = "document.querySelector('#access [role=alert]').textContent"


@asynccontextmanager
async def opened_page(
    server: RealServer, browser: str, folder: Path
) -> AsyncIterator[tuple[Harness, Page, str]]:
    """A service that requires keys, a new page, and the service's address for the browser."""
    models = {"probe": make_artifact(folder)}
    async with (
        asyncio.timeout(90),
        harness(server, models, requires_keys=True) as running,
        listening(running.app) as path,
        Proxy(lambda: path).listening() as proxy,
        new_page(browser) as page,
    ):
        yield running, page, f"http://127.0.0.1:{proxy.port}"


async def test_the_page_asks_for_a_key_and_shows_what_it_allows(
    pipeline_server: RealServer, browser: str, tmp_path: Path
) -> None:
    async with opened_page(pipeline_server, browser, tmp_path) as (running, page, address):
        add_watching(running.app, Watches(running.store, running.store.outputs, running.counts))
        add_console(running.app)
        await running.store.outputs.start()
        key = await running.key(verbs=(Verb.MODELS, Verb.WATCH, Verb.PREDICT), prefix="s")
        await page.open(f"{address}/console/#/models/probe/streams/s")
        for text in ("carry_0_1", key.removeprefix("Bearer ")):
            await page.until(f"{DIALOG}?.open")
            await page.call("Input.insertText", text=text)
            await page.press("Enter", "\r")
            if text not in key:
                await page.until(f"{DIALOG}.innerText.includes('rejected')")
        await page.until(f"!{DIALOG}.open && {STATUS} === 'Live'")
        assert await page.evaluate("document.querySelector('header').innerText.includes('Forget')")
        kept = await page.evaluate("Object.values(sessionStorage)")
        assert kept == [key.removeprefix("Bearer ")]
        assert await page.evaluate("localStorage.length + document.cookie.length") == 0

        sent = await running.chunk({"inputs": [[0.5] * 3] * 2}, headers={"authorization": key})
        assert sent.json()["position"] == 2
        await page.until(f"/Position\\s+2/.test({MAIN})")
        # what it does not allow is named in its place
        await page.until(f"/No state: .*read-state/.test({MAIN})")
        await page.evaluate("location.hash = '#/models/probe/streams/other'")
        await page.until(f"/watch.*other/.test({MAIN})")
        await page.evaluate("location.hash = '#/'")
        await page.until(f"/No metrics: .*metrics/.test({MAIN})")
        # so is a change, in the dialog that confirms it
        await page.evaluate("location.hash = '#/models/probe'")
        await page.until(f"{LOAD} !== null")
        await page.evaluate(f"{LOAD}.click()")
        await page.until("document.activeElement.name === 'path'")
        await page.call("Input.insertText", text="probe/next")
        await page.press("Enter", "\r")
        await page.until(f"/manage-models/.test({CHANGE}.querySelector('[role=alert]')?.innerText)")
        await page.evaluate(f"{CHANGE}.querySelector('[type=button]').click()")

        await page.evaluate("location.hash = '#/models/probe/streams/s'")
        await page.until(f"{STATUS} === 'Live'")
        await revoke(running.store.keys, key)
        await running.refresh_keys()
        await page.until(f"{DIALOG}.open && {DIALOG}.innerText.includes('rejected')")
        assert page.errors == []
        await running.store.outputs.close()


async def test_the_documentation_asks_for_a_key_and_uses_it(
    pipeline_server: RealServer, browser: str, tmp_path: Path
) -> None:
    async with opened_page(pipeline_server, browser, tmp_path) as (running, page, address):
        key = (await running.key(verbs=(Verb.MODELS,))).removeprefix("Bearer ")
        await page.open(f"{address}/docs")
        for text in ("carry_0_1", key):
            await page.until("document.activeElement.type === 'password'")
            await page.call("Input.insertText", text=text)
            await page.press("Enter", "\r")
            if text != key:
                await page.until(f"{ALERT}.includes('an unknown key')")
        await page.until("document.body.innerText.includes('/v1/models/{model}')")
        assert await page.evaluate("document.querySelector('#access').hidden")
        # a request that the page sends has the key
        await page.evaluate(f"{LIST_MODELS}.querySelector('.opblock-summary-control').click()")
        for button in ("try-out__btn", "execute"):
            await page.until(f"{LIST_MODELS}.querySelector('.{button}') !== null")
            await page.evaluate(f"{LIST_MODELS}.querySelector('.{button}').click()")
        await page.until(f"{ANSWER} !== null")
        answer = await page.evaluate(f"{ANSWER}.innerText")
        assert "200" in answer
        assert "probe" in answer
        assert not page.errors
        # what it shows cannot run code that reads the key
        await page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=hacked=1>')"
        )
        await page.until(
            "document.images.length && [...document.images].every((each) => each.complete)"
        )
        assert await page.evaluate("typeof hacked") == "undefined"
