"""Breadth-first search through every world that a scenario can reach.

The first broken promise that is found has no shorter way to it. Worlds are compared whole, not
by a hash of theirs; two that differ only in which worker is called the first are one.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

from tests.protocol.book import Book
from tests.protocol.breaks import FaultyStep
from tests.protocol.moves import Move, moves
from tests.protocol.promises import Broken
from tests.protocol.rules import Rules
from tests.protocol.world import Scenario, World, first_world


@dataclass(frozen=True, slots=True)
class Found:
    """What a search saw.

    Attributes:
        states: different worlds.
        transitions: steps that were taken.
        depth: the longest of the shortest ways.
        complete: nothing lies beyond; else the depth ended it.
        broken: the promise that does not hold, or None.
        path: the shortest way to where it does not.
    """

    scenario: Scenario
    book: Book
    states: int
    transitions: int
    depth: int
    complete: bool
    seconds: float
    broken: str | None = None
    path: tuple[Move, ...] = ()


def search(scenario: Scenario, rules: Rules | None = None, depth: int | None = None) -> Found:
    """Explore a scenario to a depth in steps, by default its own, or to its end."""
    book = Book(scenario, rules or Rules())
    # Worlds hold no cycles, and the collector would walk through all of them again and again.
    collects = gc.isenabled()
    gc.disable()
    try:
        return _explore(book, scenario.depth if depth is None else depth)
    finally:
        if collects:
            gc.enable()


def _explore(book: Book, limit: int) -> Found:
    began_s = time.process_time()
    scenario = book.scenario
    first = first_world(scenario)
    seen = {_canonical(first)}
    came: list[tuple[int, Move]] = [(-1, ())]
    frontier, level, transitions = [(0, first)], 0, 0

    def found(complete: bool, broken: str | None = None, path: tuple[Move, ...] = ()) -> Found:
        seconds = time.process_time() - began_s
        return Found(scenario, book, len(seen), transitions, level, complete, seconds, broken, path)

    while frontier and level < limit:
        following: list[tuple[int, World]] = []
        level += 1
        for index, world in frontier:
            for move in moves(world, book):
                transitions += 1
                try:
                    after = FaultyStep(world, book).make(move)
                except Broken as error:
                    return found(False, str(error), (*_way(came, index), move))
                canonical = _canonical(after)
                if canonical not in seen:
                    seen.add(canonical)
                    following.append((len(came), after))
                    came.append((index, move))
        frontier = following
    return found(not frontier)


def _canonical(world: World) -> World:
    one, two = world.workers
    return world if one <= two else world._replace(workers=(two, one))


def _way(came: list[tuple[int, Move]], index: int) -> tuple[Move, ...]:
    path: list[Move] = []
    while index > 0:
        index, move = came[index]
        path.append(move)
    return tuple(reversed(path))
