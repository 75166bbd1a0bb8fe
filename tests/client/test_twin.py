"""The asynchronous client is generated from the synchronous one."""

from __future__ import annotations

from tests.client.twin import PACKAGE, async_twin


def test_asynchronous_client_is_generated_from_the_synchronous_one() -> None:
    generated = async_twin((PACKAGE / "sync.py").read_text())
    message = "run `python -m tests.client.twin`"
    assert (PACKAGE / "aio.py").read_text() == generated, message
