"""The protocol keeps its promises in every world the model reaches, and so do the scripts."""

from __future__ import annotations

import pytest

from tests.protocol.against import compare
from tests.protocol.scenarios import SCENARIOS
from tests.protocol.search import search
from tests.protocol.story import story
from tests.protocol.world import Scenario
from tests.support.servers import RealServer

LEAST_STATES = 1_000


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name.partition(":")[0])
async def test_no_promise_is_broken_and_the_scripts_do_what_the_model_says(
    scenario: Scenario, valkey: RealServer
) -> None:
    found = search(scenario)
    assert found.broken is None, story(found)
    assert found.states >= LEAST_STATES
    with valkey.client() as client:
        assert await compare(found.book, [*found.book.calls], valkey.url, client) > 0
