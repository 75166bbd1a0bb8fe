"""The states of producers, consumers and an HTTP client, for the explorer."""

from collections.abc import Iterator
from typing import Any

from tests.protocol.consumer.actions import FAULTS, Action, is_done, possible_actions
from tests.protocol.consumer.scripts import ConsumerModel, ConsumerRules
from tests.protocol.consumer.state import ConsumerScenario, ConsumerState, Store
from tests.protocol.consumer.system import ConsumerSystem
from tests.protocol.state import STREAMS


class ConsumerSpace:
    """The states that a scenario can reach; from each it can be completed without faults."""

    def __init__(self, scenario: ConsumerScenario, rules: ConsumerRules | None = None):
        self.name, self.model = scenario.name, ConsumerModel(scenario, rules or ConsumerRules())

    def initial(self) -> ConsumerState:
        """An empty topic that nobody owns."""
        return ConsumerState.initial(self.model.scenario)

    def possible_actions(self, state: ConsumerState) -> Iterator[Action]:
        """Everything that may happen next."""
        return possible_actions(state, self.model)

    def is_done(self, state: ConsumerState) -> bool:
        """Whether everything is appended and acknowledged."""
        return is_done(state, self.model)

    def is_fault(self, action: Action) -> bool:
        """Whether an action happens only a limited number of times."""
        return action[0] in FAULTS

    def apply(self, state: ConsumerState, action: Action, answers: list[Any]) -> ConsumerState:
        """The state that an action leads to; adds the answers on the way. Raises Violation."""
        system = ConsumerSystem(state, self.model)
        system.answers = answers
        effect, arguments = action
        effect(system, *arguments)
        return system.freeze()

    def canonical(self, state: ConsumerState) -> ConsumerState:
        """The state with its consumers in order: they do the same."""
        one, two = state.consumers
        if one < two or (one == two and state.store.lease.owner < 1):
            return state
        older = tuple(map(_swap_owner, state.older))
        return state._replace(store=_swap_owner(state.store), older=older, consumers=(two, one))

    def describe(self, state: ConsumerState) -> list[str]:
        """What a state consists of, a line for each part."""
        store, lease = state.store, state.store.lease
        delivered, new = store.topic[: store.delivered], store.topic[store.delivered :]
        lines = [f"in transit: {_join(late)}" for late in state.in_transit]
        lines += [
            f"topic: {_join(delivered)} | {_join(new)}",
            f"pending: {_join(store.pending)}",
            f"lease: {'held' if lease.is_held else 'free'}, fence {lease.fence}, "
            f"{lease.number} commits",
            f"outputs: {_join(store.outputs)}",
        ]
        for name, version in zip(STREAMS, store.states, strict=True):
            lines.append(f"state {name}: {version}")
        for number, consumer in enumerate(state.consumers):
            lines.append(f"consumer {number} fence: {consumer.fence}")
            lines.append(f"consumer {number} waiting: {_join(consumer.waiting)}")
            lines.append(f"consumer {number} cache: {_join(consumer.cache)}")
            lines.append(f"consumer {number} connection: {_join(consumer.connection)}")
        return lines


def _swap_owner(store: Store) -> Store:
    lease = store.lease
    return store._replace(lease=lease._replace(owner=1 - lease.owner if lease.owner >= 0 else -1))


def _join(values: tuple[Any, ...]) -> str:
    return "; ".join(map(str, values))
