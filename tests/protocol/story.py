"""A path through the model, told as a numbered story: who did what, what the store held."""

from __future__ import annotations

from tests.protocol.breaks import FaultyStep
from tests.protocol.promises import Broken
from tests.protocol.search import Found
from tests.protocol.words import at
from tests.protocol.world import STREAMS, World, first_world


def story(found: Found) -> str:
    """The steps of a search's path, each with the store after it, and what broke."""
    lines = [f"Scenario {found.scenario.name!r}, {len(found.path)} steps:"]
    world = first_world(found.scenario)
    for number, move in enumerate(found.path, 1):
        notes: list[str] = []
        step = FaultyStep(world, found.book, notes)
        broken = None
        try:
            world = step.make(move)
        except Broken as error:
            broken = str(error)
        first, *rest = notes
        lines.append(f"{number:3}. {first}")
        lines += [f"     {note}" for note in rest]
        if broken is not None:
            lines.append(f"     BROKEN: {broken}")
        else:
            lines.append(f"     store: {_store(found, world)}")
    return "\n".join(lines)


def _store(found: Found, world: World) -> str:
    held = []
    for name, slot in zip(STREAMS, world.store, strict=True):
        if slot.state or slot.reply:
            reply = "none"
            if slot.reply:
                reply = "its own" if slot.reply == slot.state else at(found.book, slot.reply)
            held.append(f"{name} = {at(found.book, slot.state)}, reply: {reply}")
    return "; ".join(held) or "empty"
