"""No invariant is violated in any state of the model, and the scripts do what the model says.

Every planted bug is found, with a readable trace; those in scripts also on a real server.
"""

import hashlib
import re
from collections.abc import Iterator

import pytest

from service.store.redis.redis_store import Script
from tests.protocol.chunks import ChunkSpace
from tests.protocol.explorer import explore, format_trace
from tests.protocol.scenarios import PLANTED_BUGS, SCENARIOS, PlantedBug
from tests.protocol.script_comparison import ScriptMismatch, compare_script_calls
from tests.protocol.state import Scenario
from tests.support.servers import RealServer, real_server

MIN_STATES = 1_000


@pytest.fixture(scope="module")
def valkey() -> Iterator[RealServer]:
    """A running Valkey; each comparison empties it."""
    with real_server("valkey") as running:
        yield running


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name.partition(":")[0])
async def test_invariants_hold_and_scripts_match_the_model(
    scenario: Scenario, valkey: RealServer
) -> None:
    result = explore(ChunkSpace(scenario), scenario.depth)
    assert result.violation is None, format_trace(result)
    assert result.states >= MIN_STATES
    with valkey.client() as client:
        assert await compare_script_calls(result.space.model, valkey.url, client) > 0


@pytest.mark.harness
@pytest.mark.parametrize("bug", PLANTED_BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_found_with_a_trace(bug: PlantedBug) -> None:
    result = explore(ChunkSpace(bug.scenario, bug.rules), bug.scenario.depth)
    assert result.violation is not None
    assert bug.violation in result.violation
    trace = format_trace(result)
    print(trace)
    numbers = [int(number) for number in re.findall(r"^ *(\d+)\. ", trace, re.MULTILINE)]
    assert numbers == list(range(1, len(result.path) + 1))
    assert trace.endswith(f"VIOLATION: {result.violation}")


@pytest.mark.harness
@pytest.mark.parametrize("bug", [b for b in PLANTED_BUGS if b.lua], ids=lambda bug: bug.name)
async def test_changed_script_differs_from_the_model(
    bug: PlantedBug, valkey: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, old, new = bug.lua
    original = Script.load(name)
    assert original.text.count(old.encode()) == 1
    text = original.text.replace(old.encode(), new.encode())
    changed = Script(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())
    found = explore(ChunkSpace(bug.scenario, bug.rules), bug.scenario.depth)
    buggy, depth = found.space.model, max(8, len(found.path))
    correct = explore(ChunkSpace(bug.scenario), depth).space.model
    with valkey.client() as client:
        await compare_script_calls(correct, valkey.url, client)
        with pytest.raises(ScriptMismatch):
            await compare_script_calls(buggy, valkey.url, client)
        load = Script.load
        monkeypatch.setattr(Script, "load", lambda each: changed if each == name else load(each))
        await compare_script_calls(buggy, valkey.url, client)
        with pytest.raises(ScriptMismatch):
            await compare_script_calls(correct, valkey.url, client)
