"""The pages for clients of Triton: their requests and their Python, run against a service."""

from __future__ import annotations

import contextlib
import io
import json

import httpx

from tests.support.needs import needs_tools
from tests.support.pages import DEFAULT_URL, agrees, blocks, run
from tests.support.service import Service

PAGE = "docs/reference/kserve.md"


@needs_tools("curl")
def test_reference_shows_the_real_reply(service: Service) -> None:
    request, *_ = [text for language, text in blocks(PAGE) if language == "sh"]
    shown, error, *_ = [json.loads(text) for language, text in blocks(PAGE) if language == "json"]
    agrees(run(request, service.url), shown)
    wrong = request.replace('"position": 0', '"position": 9').replace(
        '"sequence_start": true, ', ""
    )
    agrees(run(wrong, service.url), error)


def test_guide_sends_a_sequence(service: Service) -> None:
    with httpx.Client(base_url=service.url) as client:
        client.delete("/v1/models/flights/streams/from-triton")
    [script] = [text for language, text in blocks(PAGE) if language == "python"]
    address = DEFAULT_URL.removeprefix("http://")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(script.replace(address, service.url.removeprefix("http://")), {})
    lines = printed.getvalue().splitlines()
    assert [line.split(" ")[0] for line in lines] == ["1", "2"]
