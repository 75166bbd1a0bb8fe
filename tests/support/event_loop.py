"""The event loop of async tests: uvloop, which closes what a test left open and fails it, and ends
at a test's timeout."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import uvloop


class EventLoop(uvloop.Loop):
    """The loop of the service. It reports each open transport at its end by a warning; where
    warnings are errors, it would not close that transport, and would wait for its end forever."""

    _failure: BaseException | None = None

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """End the loop if the test failed in a callback, as at its timeout, which is a signal."""
        if isinstance(failure := context.get("exception"), pytest.fail.Exception):
            self._failure = failure
            self.stop()
        else:
            super().call_exception_handler(context)

    def run_until_complete(self, future: Any) -> Any:
        """Run like any loop, and raise what ended it."""
        try:
            return super().run_until_complete(future)
        except RuntimeError:
            if self._failure is None:
                raise
            failure, self._failure = self._failure, None
            raise failure from None

    def close(self) -> None:
        """Close the loop and all that is open on it."""
        with warnings.catch_warnings(record=True) as unclosed:
            warnings.simplefilter("always", ResourceWarning)
            super().close()
            if unclosed:
                gc.collect()  # what used it warns now, not in another test
        if unclosed:
            found = "\n".join(str(warning.message) for warning in unclosed)
            pytest.fail(f"a test or fixture left open on its event loop:\n{found}", pytrace=False)
