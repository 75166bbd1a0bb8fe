"""No invariant of consumers is violated in any state of the model, each state leads to an end, and
the scripts of topics do what the model says.

Every planted bug is found, with a readable trace.
"""

from collections.abc import Iterator

import pytest

from tests.protocol.consumer.scenarios import (
    CONSUMER_SCENARIOS,
    PLANTED_CONSUMER_BUGS,
    PlantedConsumerBug,
)
from tests.protocol.consumer.script_comparison import compare_topic_calls
from tests.protocol.consumer.space import ConsumerSpace
from tests.protocol.consumer.state import ConsumerScenario
from tests.protocol.explorer import explore, format_trace
from tests.support.servers import RealServer, real_server

MIN_STATES = 1_000
COMPARED_CALLS = 150
"""Of each scenario; `make model` compares all."""


@pytest.fixture(scope="module")
def valkey() -> Iterator[RealServer]:
    """A running Valkey; each comparison empties it."""
    with real_server("valkey") as running:
        yield running


@pytest.mark.parametrize("scenario", CONSUMER_SCENARIOS, ids=lambda s: s.name.partition(":")[0])
async def test_invariants_of_consumers_hold_and_scripts_match_the_model(
    scenario: ConsumerScenario, valkey: RealServer
) -> None:
    result = explore(ConsumerSpace(scenario))
    assert result.violation is None, format_trace(result)
    assert result.is_complete
    assert result.states >= MIN_STATES
    with valkey.client() as client:
        model = result.space.model
        assert await compare_topic_calls(model, valkey.url, client, COMPARED_CALLS) > 0


@pytest.mark.harness
@pytest.mark.parametrize("bug", PLANTED_CONSUMER_BUGS, ids=lambda bug: bug.name)
def test_planted_bug_of_consumers_is_found_with_a_trace(bug: PlantedConsumerBug) -> None:
    result = explore(ConsumerSpace(bug.scenario, bug.rules))
    assert result.violation is not None
    assert bug.violation in result.violation
    trace = format_trace(result)
    print(trace)
    assert trace.count("\n") >= len(result.path)
    assert trace.endswith(f"VIOLATION: {result.violation}")
