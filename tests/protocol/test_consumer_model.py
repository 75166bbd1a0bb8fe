"""No invariant of consumers is violated in any state of the model, and each state leads to an end.

Every planted bug is found, with a readable trace.
"""

import pytest

from tests.protocol.consumer.scenarios import (
    CONSUMER_SCENARIOS,
    PLANTED_CONSUMER_BUGS,
    PlantedConsumerBug,
)
from tests.protocol.consumer.space import ConsumerSpace
from tests.protocol.consumer.state import ConsumerScenario
from tests.protocol.explorer import explore, format_trace

MIN_STATES = 1_000


@pytest.mark.parametrize("scenario", CONSUMER_SCENARIOS, ids=lambda s: s.name.partition(":")[0])
def test_invariants_of_consumers_hold_and_an_end_is_reachable(scenario: ConsumerScenario) -> None:
    result = explore(ConsumerSpace(scenario))
    assert result.violation is None, format_trace(result)
    assert result.is_complete
    assert result.states >= MIN_STATES


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
