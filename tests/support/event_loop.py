"""The event loop of async tests: uvloop, which closes what a test left open and fails it."""

from __future__ import annotations

import warnings

import pytest
import uvloop


class EventLoop(uvloop.Loop):
    """The loop of the service. It reports each open transport at its end by a warning; where
    warnings are errors, it would not close that transport, and would wait for its end forever."""

    def close(self) -> None:
        """Close the loop and all that is open on it."""
        with warnings.catch_warnings(record=True) as unclosed:
            warnings.simplefilter("always", ResourceWarning)
            super().close()
        if unclosed:
            found = "\n".join(str(warning.message) for warning in unclosed)
            pytest.fail(f"a test or fixture left open on its event loop:\n{found}", pytrace=False)
