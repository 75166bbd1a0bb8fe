"""Changes that the console makes, in Chromium: which version answers, and rewinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from carry_client import AsyncCarry, Problem
from tests.faults.network import FEATURES, MODEL, write
from tests.support.browser import Page, new_page
from tests.support.needs import needs_tools
from tests.support.servers import until_async
from tests.support.service import running

pytestmark = needs_tools("chromium")

BASE = f"/v1/models/{MODEL}"
STREAM = f"{BASE}/streams/s"
TEXT = "document.querySelector('main')?.innerText"
DIALOG = "document.querySelector('main dialog')"
ALERT = f"{DIALOG}?.querySelector('[role=alert]')?.innerText"


async def open_dialog(page: Page, name: str) -> str:
    """Press a button by its name; the text of the dialog that it opens."""
    button = (
        "[...document.querySelectorAll('main section button')]"
        f".find((each) => (each.ariaLabel ?? each.innerText) === {json.dumps(name)})"
    )
    await page.until(f"{button} !== undefined")
    await page.evaluate(f"{button}.focus()")
    await page.press("Enter", "\r")
    text = await page.until(f"{DIALOG}?.open && {DIALOG}.innerText")
    await page.assert_accessible()
    return str(text)


async def confirm(page: Page, **fields: str) -> None:
    """Fill the dialog in, and press its last button."""
    for name, value in fields.items():
        await page.evaluate(f"{DIALOG}.querySelector('[name={name}]').select()")
        await page.call("Input.insertText", text=value)
    await page.evaluate(f"{DIALOG}.querySelector('button.primary').click()")


async def closes(page: Page) -> None:
    await page.until(f"{DIALOG} === null")


async def cancel(page: Page) -> None:
    await page.evaluate(f"{DIALOG}.querySelector('button[type=button]').click()")
    await closes(page)


async def test_versions_are_changed_by_buttons_that_say_what_happens(
    tmp_path: Path, browser: str
) -> None:
    models = tmp_path / "models"
    write(models, f"{MODEL}/a")
    write(models, f"{MODEL}/b", gain=2)
    settings = {"CARRY_HISTORY_EVENTS": "10", "CARRY_ON_MODEL_CHANGE": "rewarm"}
    with running(tmp_path, models, **settings) as service:
        async with AsyncCarry(service.url) as carry, new_page(browser) as page:

            async def aliases() -> dict[str, Any]:
                listed: Any = await carry.request("GET", f"{BASE}/versions")
                return {each["version"]: each["alias"] for each in listed["versions"]}

            [new] = await aliases()
            await page.open(f"{service.url}/console/#/models/{MODEL}")

            # an error is shown as the API words it, and the dialog stays open
            assert "answers no stream" in await open_dialog(page, "Load a version")
            body = {"path": f"{MODEL}/none"}
            with pytest.raises(Problem) as problem:
                await carry.request("POST", f"{BASE}/versions", body)
            await confirm(page, **body)
            assert await page.until(ALERT) == problem.value.detail
            await confirm(page, path=f"{MODEL}/a", label="older")
            await closes(page)
            await page.until(f"{TEXT}.includes('older')")
            [old] = set(await aliases()) - {new}

            # nothing changes before it is confirmed, and Enter alone does not confirm
            text = await open_dialog(page, f"Shadow {old}")
            assert f"{old} computes beside {new}, which answers all streams." in text
            await page.press("Enter", "\r")
            await closes(page)
            assert await page.evaluate("document.activeElement.ariaLabel") == f"Shadow {old}"
            assert await aliases() == {new: "champion", old: None}
            await open_dialog(page, f"Shadow {old}")
            await confirm(page)
            await closes(page)
            assert await aliases() == {new: "champion", old: "challenger"}

            await open_dialog(page, f"Canary {old}")
            await confirm(page, share="25")
            await closes(page)
            for shown in ("challenger", "25 %", "champion", "75 %", "1 of 1"):
                await page.until(f"{TEXT}.includes('{shown}')")

            assert f"{old} answers all streams; {new}" in await open_dialog(page, f"Promote {old}")
            await confirm(page)
            await closes(page)
            assert await aliases() == {new: "challenger", old: "champion"}

            text = await open_dialog(page, f"Roll back to {new}")
            assert f"{new} answers all streams again" in text
            await confirm(page)
            await closes(page)
            assert await aliases() == {new: "champion", old: "challenger"}

            assert "nothing computes beside it" in await open_dialog(page, f"Retire {old}")
            await confirm(page)
            await closes(page)
            assert await aliases() == {new: "champion"}
            # the champion has no button, nor has what cannot be taken back
            await page.until(f"!{TEXT}.includes('older') && !{TEXT}.includes('Roll back')")
            assert await page.evaluate("document.querySelectorAll('main td button').length") == 0
            assert page.errors == []


async def test_a_stream_is_rewound_from_the_state_that_the_page_showed(
    tmp_path: Path, browser: str
) -> None:
    models = write(tmp_path / "models")
    with running(tmp_path, models, CARRY_HISTORY_EVENTS="10") as service:
        async with httpx.AsyncClient(base_url=service.url) as client, new_page(browser) as page:

            async def position() -> int:
                return int((await client.get(STREAM)).json()["position"])

            event = {"inputs": [[1.0] * FEATURES]}
            for _ in range(3):
                await client.post(f"{STREAM}/chunks", json=event)
            await page.open(f"{service.url}/console/#/models/{MODEL}/streams/s")
            text = await open_dialog(page, "Rewind")
            assert "0 to 3" in text
            assert "from position 3" in text

            await client.post(f"{STREAM}/chunks", json=event)
            await confirm(page, position="1")
            assert await page.until(ALERT)
            assert await position() == 4
            await cancel(page)

            async def opens_at_4() -> bool:
                if "from position 4" in await open_dialog(page, "Rewind"):
                    return True
                await cancel(page)
                return False

            await until_async(opens_at_4, "the page's read of the new head")
            await confirm(page, position="1")

            async def is_rewound() -> bool:
                return await position() == 1

            await until_async(is_rewound, "the rewind")
            await page.until(f"/Position\\s+1\\s/.test({TEXT})")
            assert page.errors == []
