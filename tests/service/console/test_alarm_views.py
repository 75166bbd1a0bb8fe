"""Open alarms in the console, in Chromium: listed, on the page of their stream, acknowledged."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from service.console.page import add_console
from tests.service.transports.live.sockets import live_application
from tests.service.transports.v1 import harness as harness_module
from tests.service.transports.v1.harness import listening
from tests.support.alarms import alarm_model, noise, raised, served_by_onnx
from tests.support.browser import new_page
from tests.support.needs import needs_tools
from tests.support.proxy import Proxy
from tests.support.servers import RealServer

pytestmark = needs_tools("chromium")

CELLS = "[...document.querySelectorAll('td')].map((each) => each.innerText)"
ALERT = "document.querySelector('main [role=alert]')?.innerText ?? ''"
RECORD_LABELS = """(() => {
  window.labels = [];
  const { fillText } = CanvasRenderingContext2D.prototype;
  CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
    labels.push(text);
    return fillText.call(this, text, ...rest);
  };
})()"""
BUTTON = """[...document.querySelectorAll({!r})]
  .find((each) => each.innerText === 'Acknowledge')"""
SHADED = """[...document.querySelectorAll('canvas')].some((canvas) => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  const probe = document.createElement('i');
  probe.style.color = 'var(--alarm)';
  document.body.append(probe);
  const [red, green, blue] = getComputedStyle(probe).color.match(/[0-9]+/g).map(Number);
  probe.remove();
  return data.some((value, at) => at % 4 === 0
    && value === red && data[at + 1] === green && data[at + 2] === blue);
})"""


async def test_an_alarm_is_listed_shaded_and_acknowledged(
    pipeline_server: RealServer,
    browser: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness_module, "numpy_served", served_by_onnx)
    models = {"sensors": alarm_model(tmp_path)}
    async with (
        asyncio.timeout(120),
        live_application(pipeline_server, models, extend=add_console) as api,
        listening(api.app) as path,
        Proxy(lambda: path).listening() as proxy,
        new_page(browser) as page,
    ):
        rows = np.concatenate([noise(40), raised(4)])
        for at in range(0, len(rows), 11):
            body = {"inputs": rows[at : at + 11].tolist()}
            assert (await api.chunk(body, model="sensors", stream="pump")).is_success
        await page.open(f"http://127.0.0.1:{proxy.port}/console/#/models/sensors")
        await page.until(f"{CELLS}.includes('pump') && {CELLS}.some((each) => /value/.test(each))")
        await page.assert_accessible()
        await page.evaluate(RECORD_LABELS)
        await page.evaluate("location.hash = '#/models/sensors/streams/pump'")
        await page.until(f"({ALERT}).includes('since event 40: ')")
        # the axis of the probability is logarithmic
        await page.until(r"labels.includes('1') && labels.some((each) => /^1\.0e-\d+$/.test(each))")
        await page.until(SHADED)
        await page.assert_accessible()
        await page.evaluate(f"{BUTTON.format('[role=alert] button')}.click()")
        await page.until("document.querySelector('dialog[open]') !== null")
        await page.evaluate(f"{BUTTON.format('dialog button')}.click()")
        await page.until(f"({ALERT}) === ''")
        assert (await api.client.get("/v1/models/sensors/alarms")).json()["alarms"] == []
        assert page.errors == []
