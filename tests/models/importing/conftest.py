"""Short verification: the original and the packaged model run step by step, without a compiler."""

from __future__ import annotations

import pytest

from models.importing import verification


@pytest.fixture(autouse=True)
def short_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare sequences of 1 and 6 steps, of which the longer one is at least two chunks; `carry
    import` (`test_isolation`) compares others too."""
    monkeypatch.setattr(verification, "LENGTHS_STEPS", (1, 6))
