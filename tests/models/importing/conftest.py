"""Short verification: the original and the packaged model run step by step, without a compiler."""

from __future__ import annotations

import pytest

from models.importing import verification


@pytest.fixture(autouse=True)
def short_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare sequences of 1, 2 and 7 steps; `carry import` (`test_isolation`) compares longer ones
    too."""
    monkeypatch.setattr(verification, "LENGTHS_STEPS", (1, 2, 7))
