"""The examples of the README and of the first tutorial, run against a service."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.support.needs import needs_tools
from tests.support.pages import DEFAULT_URL, ROOT, agrees, blocks, run
from tests.support.service import Service

pytestmark = [needs_tools("curl"), pytest.mark.usefixtures("model_dir")]


def run_page(page: str, service: Service) -> tuple[list[Any], int]:
    """Run a page's commands on a service without streams and compare the replies it shows.

    Returns the reply of each command, and how many of them the page shows.
    """
    with httpx.Client(base_url=service.url) as client:
        client.delete("/v1/models/flights/streams", params={"prefix": ""}).raise_for_status()
    replies: list[Any] = []
    shown = 0
    for language, text in blocks(page):
        if language == "sh":
            replies.append(run(text, service.url))
        elif language == "json":
            agrees(replies[-1], json.loads(text))
            shown += 1
    return replies, shown


def test_readme_shows_the_real_replies(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replies, shown = run_page("README.md", service)
    assert [reply.get("position") for reply in replies] == [4, 6, 6, 6]
    assert [reply.get("replayed") for reply in replies[:3]] == [False, False, True]
    assert replies[2]["outputs"] == replies[1]["outputs"]
    assert shown == 2
    (script,) = (text for language, text in blocks("README.md") if language == "python")
    monkeypatch.chdir(ROOT)
    exec(compile(script.replace(DEFAULT_URL, service.url), "README.md", "exec"), {})
    shape = re.search(r"shape: \((\d+), 6\)", capsys.readouterr().out)
    departures = json.loads((ROOT / "examples" / "departures.json").read_bytes())["EWR-UA"]
    assert shape is not None
    assert int(shape[1]) == len(departures) - 6


def test_first_tutorial_shows_the_real_replies(service: Service) -> None:
    (deleted, *replies), shown = run_page("docs/tutorials/first-stream.md", service)
    assert deleted["code"] == "stream_not_found"
    assert replies[2]["outputs"] == replies[1]["outputs"]
    assert shown == len(replies) == 5
