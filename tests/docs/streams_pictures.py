"""Takes the pictures of the tutorial of topics: the console while consumers process departures.

python -m tests.docs.streams_pictures docs/tutorials/streams-in-streams-out
"""

from __future__ import annotations

import base64
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import redis
import uvloop

from examples.topics.producer import produce
from models.pretrained import departures
from tests.support.browser import Page, new_page, running_browser
from tests.support.consumers import ConsumerProcess
from tests.support.pages import ROOT
from tests.support.servers import free_port, real_server
from tests.support.service import running

EVENTS_PER_S = 30
PARTITIONS = 8
STREAM = "live-EWR-EV"
WIDTH, HEIGHT = 1200, 760
ROWS = "document.querySelectorAll('tbody tr').length"
RATE = "Number(document.querySelectorAll('tbody td')[3]?.innerText) > 10"
STEPS = 40
FIRST_TILE = "Number(document.querySelector('.tiles dd')?.innerText)"


async def take(page: Page, address: str, ready: str, height: int = HEIGHT) -> bytes:
    """Take a picture of a view once a script is true."""
    await page.call(
        "Emulation.setDeviceMetricsOverride",
        width=WIDTH, height=height, deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    await page.evaluate(f"location.hash = '{address}'")
    await page.until(ready)
    picture = await page.call("Page.captureScreenshot", format="png")
    return base64.b64decode(picture["data"])


async def take_all(browser: str, url: str) -> dict[str, bytes]:
    """Take the pictures of a service's console."""
    async with new_page(browser) as page:
        await page.open(f"{url}/console/#/topics")
        await page.until(RATE)
        await page.evaluate("document.querySelector('tbody button').click()")
        rows = f"{ROWS} > {PARTITIONS} && {RATE}"
        topics = await take(page, "#/topics", rows, 620)
        rate = f"{ROWS} > 10 && {FIRST_TILE} > 10"
        topic = await take(page, "#/topics/carry/departures", rate, 900)
        begun = f"{FIRST_TILE} > {STEPS}"
        stream = await take(page, f"#/models/flights/streams/{STREAM}", begun)
        return {"topics": topics, "topic": topic, "stream": stream}


def keep_producing(url: str) -> None:
    """Produce until the store is stopped."""
    with suppress(redis.RedisError), redis.Redis.from_url(url) as client:
        produce(client, EVENTS_PER_S, PARTITIONS)


def main(folder: Path) -> None:
    """Run a store, a service, a producer and two consumers, and take the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    models = Path(departures.__file__).parent
    at = ("--bind", "127.0.0.1", "--port", str(port := free_port()))
    url = f"redis://127.0.0.1:{port}"
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (scratch / "browser").mkdir()
        stack.enter_context(real_server("valkey", *at))
        partitions = str(PARTITIONS)
        service = stack.enter_context(
            running(scratch, models, redis_url=url, CARRY_PARTITIONS=partitions)
        )
        config = str(ROOT / "examples" / "topics" / "consumer.yaml")
        for number in range(2):
            words = (config, "--redis-url", url)
            consumer = ConsumerProcess(
                scratch / f"{number}.log", *words, CARRY_PARTITIONS=partitions
            )
            stack.callback(consumer.fork.kill)
            consumer.wait_for("consumer_joined")
        threading.Thread(target=keep_producing, args=(url,), daemon=True).start()
        browser = stack.enter_context(running_browser(scratch / "browser"))
        for name, picture in uvloop.run(take_all(browser, service.url)).items():
            (folder / f"{name}.png").write_bytes(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
