"""What some tests need beside the project's own environment; skipped, visibly, without it."""

from __future__ import annotations

import shutil

import pytest

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not on the PATH"
)
