"""The README's examples, as they are written, against a running service."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.support.needs import needs_tools
from tests.support.pages import agrees, blocks, run
from tests.support.service import Service

pytestmark = needs_tools("curl")


@pytest.mark.usefixtures("model_dir")
def test_every_block_gives_what_the_readme_shows(service: Service) -> None:
    with httpx.Client(base_url=service.url) as client:
        client.delete("/v1/models/flights/streams", params={"prefix": ""}).raise_for_status()
    replies: list[Any] = []
    shown = 0
    for language, text in blocks("README.md"):
        if language == "sh":
            replies.append(run(text, service.url))
        elif language == "json":
            agrees(replies[-1], json.loads(text))
            shown += 1
    assert [reply.get("position") for reply in replies[:4]] == [4, 6, 6, 6]
    assert [reply.get("replayed") for reply in replies[:3]] == [False, False, True]
    assert replies[2]["outputs"] == replies[1]["outputs"]
    assert [item["status"] for item in replies[4]["results"]] == [200, 200]
    assert replies[5]["position"] == 8
    assert shown == 2
