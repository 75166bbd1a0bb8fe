"""Which positions of a stream's past are exact, compared with a search from every kept state."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from service.pipeline.rewind import Past

POSITIONS = st.integers(0, 40)


@st.composite
def pasts(draw: st.DrawFn) -> Past:
    """Any past; the chunks of a model that sees each as a whole fill the kept events."""
    start, end = sorted((draw(POSITIONS), draw(POSITIONS)))
    states = sorted(draw(st.sets(POSITIONS.filter(lambda each: each <= end), max_size=6)))
    cuts = None
    if draw(st.booleans()):
        inside = st.integers(start, end)
        cuts = sorted({*draw(st.sets(inside, max_size=8)), end} - {start})
        # a state is only ever kept at the end of a chunk
        states = [each for each in states if each <= start or each in cuts]
    return Past(states, start, end, cuts)


def reachable(past: Past) -> dict[int, int]:
    """For each position with an exact state the closest kept state, by running over the events."""
    found: dict[int, int] = {}
    for state in past.states:
        position = state
        found[position] = state
        while past.start <= position < past.end:
            position += 1
            if past.cuts is None or position in past.cuts:
                found[position] = state
    return found


@given(pasts())
def test_a_position_has_a_base_if_and_only_if_kept_events_lead_to_it(past: Past) -> None:
    expected = reachable(past)
    assert {
        position: base for position in range(50) if (base := past.find_base(position)) is not None
    } == expected


@given(pasts())
def test_available_ranges_are_the_positions_with_a_base(past: Past) -> None:
    ranges = past.available()
    positions = [each for first, last in ranges for each in range(first, last + 1)]
    assert positions == sorted(reachable(past))
    assert all(after > last + 1 for (_, last), (after, _) in pairwise(ranges))
