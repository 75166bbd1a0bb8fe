"""Skip marks of tests that need more than the project's environment."""

from __future__ import annotations

import shutil

import pytest


def needs_tools(*names: str) -> pytest.MarkDecorator:
    """Skips where a program is not on the PATH, naming it."""
    missing = [name for name in names if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not on the PATH: {', '.join(missing)}")


needs_redis = needs_tools("redis-server")
