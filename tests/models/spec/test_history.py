"""Histories in specifications, which change no fingerprint."""

from __future__ import annotations

import pytest

from models.artifact.fingerprint import compute_fingerprint
from models.errors import SpecError
from models.spec.history import HistorySpec, parse_history_events
from models.spec.model import parse_spec
from tests.support.models import SMALL, random_weights, small_spec


def test_a_history_is_no_part_of_the_fingerprint() -> None:
    spec, weights = small_spec(), random_weights(small_spec())
    kept = parse_spec({**SMALL, "history": {"events": 64}})
    assert kept.history == HistorySpec(events=64, snapshots=8)
    assert "history" not in spec.model_dump()
    assert compute_fingerprint(kept, weights) == compute_fingerprint(parse_spec({**SMALL}), weights)


@pytest.mark.parametrize(
    "history", [{}, {"events": 0}, {"events": 65_537}, {"events": 1, "snapshots": 1}, {"size": 1}]
)
def test_invalid_histories_are_rejected(history: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="history"):
        parse_spec({**SMALL, "history": history})


def test_numbers_of_events_are_of_all_models_or_of_each() -> None:
    assert parse_history_events("") == {}
    assert parse_history_events("64") == {None: 64}
    assert parse_history_events(" a=64, 0,b-2=256 ") == {"a": 64, None: 0, "b-2": 256}
    for invalid in ("x", "-1", "a=", "=5", "a=1,a=2", "1,2", "65537", "a=1.5", "a=1,"):
        with pytest.raises(ValueError, match="expected N or MODEL=N"):
            parse_history_events(invalid)
