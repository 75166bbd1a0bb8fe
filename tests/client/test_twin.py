"""The asynchronous client is generated from the synchronous one."""

from __future__ import annotations

import pytest

from tests.client.twin import FILES, PACKAGE, async_twin


@pytest.mark.parametrize(("source", "twin"), FILES.items())
def test_asynchronous_client_is_generated_from_the_synchronous_one(source: str, twin: str) -> None:
    generated = async_twin((PACKAGE / source).read_text())
    assert (PACKAGE / twin).read_text() == generated, "run `python -m tests.client.twin`"
