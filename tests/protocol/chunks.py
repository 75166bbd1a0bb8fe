"""The states of clients that send chunks to two workers, for the explorer."""

from collections.abc import Iterator
from typing import Any

from tests.protocol.actions import Action, possible_actions
from tests.protocol.model import Model, Rules
from tests.protocol.state import STREAMS, Scenario, SystemState
from tests.protocol.system import System


class ChunkSpace:
    """The states that a scenario can reach; it may end in any of them."""

    def __init__(self, scenario: Scenario, rules: Rules | None = None):
        self.name, self.model = scenario.name, Model(scenario, rules or Rules())
        self.is_done = None

    def initial(self) -> SystemState:
        """Nothing stored, nothing sent."""
        return SystemState.initial(self.model.scenario)

    def possible_actions(self, state: SystemState) -> Iterator[Action]:
        """Everything that may happen next."""
        return possible_actions(state, self.model)

    def apply(self, state: SystemState, action: Action, answers: list[Any]) -> SystemState:
        """The state that an action leads to; adds the answers on the way. Raises Violation."""
        system = System(state, self.model)
        system.answers = answers
        return system.apply(action)

    def canonical(self, state: SystemState) -> SystemState:
        """The state with its workers in order: they do the same."""
        one, two = state.workers
        return state if one < two else state._replace(workers=(two, one))

    def describe(self, state: SystemState) -> list[str]:
        """What a state consists of, a line for each part."""
        lines = [f"in transit: {'; '.join(map(str, late))}" for late in state.in_transit]
        for name, stored in zip(STREAMS, state.store, strict=True):
            lines.append(f"store {name}: {stored.state}, reply: {stored.reply}")
            _, entries, *states = stored.history
            events = (f"{start}: {events}" for start, events, *_ in entries)
            for what, values in zip(
                ("events", "snapshots", "states"), (events, *states), strict=True
            ):
                lines.append(f"store {name}, {what}: {'; '.join(map(str, values))}")
        for number, (cache, connection, queue, route) in enumerate(state.workers):
            lines.append(f"worker {number} has noticed {route} changes of the model")
            for what, values in (("cache", cache), ("connection", connection), ("queue", queue)):
                lines.append(f"worker {number} {what}: {'; '.join(map(str, values))}")
        return lines
