"""What keeps tests of the transports independent of the speed of the machine."""

from __future__ import annotations

import pytest

from service.access import limits


@pytest.fixture(autouse=True)
def leases_are_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a key spends while the store is slow counts, too: otherwise it may be leased again."""
    monkeypatch.setattr(limits, "RENEW_TIMEOUT_S", 60.0)
