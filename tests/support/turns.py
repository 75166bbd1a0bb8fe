"""Keeps tests that measure time from sharing the machine with tests of other workers.

Under pytest-xdist a test marked `alone` waits until no other worker runs a test, and no other
worker starts one before it has ended. Two file locks do that: every test holds `_RUNNING`, shared
or exclusive, and takes it while it holds `_ENTRY`, so that a waiting test is not overtaken.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ENTRY = Path(__file__)
_RUNNING = Path(__file__).parent


@contextmanager
def _locked(path: Path, operation: int) -> Iterator[None]:
    """A lock on a file, released at the end; another open file of this process has its own."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def turn(alone: bool) -> Iterator[None]:
    """One test's turn among the workers of this checkout."""
    if alone:
        with _locked(_ENTRY, fcntl.LOCK_EX), _locked(_RUNNING, fcntl.LOCK_EX):
            yield
        return
    descriptor = os.open(_RUNNING, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _locked(_ENTRY, fcntl.LOCK_EX):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)
