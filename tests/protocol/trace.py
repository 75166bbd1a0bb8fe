"""A path through the model as a numbered trace: each move, the answers, and what it changed."""

from __future__ import annotations

from tests.protocol.explorer import Exploration
from tests.protocol.faults import FaultyTransition
from tests.protocol.invariants import Violation
from tests.protocol.transitions import Move
from tests.protocol.values import Values
from tests.protocol.world import STREAMS, Kind, Request, World, first_world


def format_trace(result: Exploration) -> str:
    """The steps of an exploration's path, and the violation at its end."""
    values, world = result.values, first_world(result.scenario)
    lines = [f"Scenario {result.scenario.name!r}, {len(result.path)} steps:"]
    for number, move in enumerate(result.path, 1):
        lines.append(f"{number:3}. {_show_move(move, values)}")
        step, before, last = FaultyTransition(world, values), _show_world(world, values), []
        try:
            world = step.apply(move)
        except Violation as violation:
            last = [f"VIOLATION: {violation}"]
        for job, answer in step.replies:
            shown = answer if isinstance(answer, str) else values.show_state(answer)
            lines.append(f"     answer to {values.show_job(job)}: {shown}")
        lines += [
            f"     {line}" for line in last or _show_world(world, values) if line not in before
        ]
    return "\n".join(lines)


def _show_move(move: Move, values: Values) -> str:
    name, *arguments = move
    if name == "send":
        client = values.scenario.clients[arguments[0]]
        return f"{client.name} sends {client.plans[arguments[1]].name} to worker {arguments[2] + 1}"
    return f"{name} {', '.join(map(str, arguments))}"


def _show_world(world: World, values: Values) -> list[str]:
    show = values.show_state
    lines = []
    for name, slot in zip(STREAMS, world.store, strict=True):
        reply = show(slot.reply) if slot.reply else "none"
        lines.append(f"store {name}: {show(slot.state)}, reply: {reply}")
    for number, worker in enumerate(world.workers, 1):
        caches = zip(STREAMS, worker.cache, strict=True)
        lines += [f"worker {number} cache {name}: {show(state)}" for name, state in caches]
        lines.append(f"worker {number} connection: {_show_requests(worker.pipeline, values)}")
        lines.append(f"worker {number} waiting: {[values.show_job(job) for job in worker.waiting]}")
    return lines + [f"in transit: {_show_requests(late, values)}" for late in world.in_transit]


def _show_requests(requests: tuple[Request, ...], values: Values) -> str:
    show = values.show_state
    return "; ".join(
        f"{Kind(r.kind).name} {values.show_job(r.job)} ({show(r.base)} -> {show(r.new)})"
        + " abandoned" * bool(r.outcome)
        for r in requests
    )
