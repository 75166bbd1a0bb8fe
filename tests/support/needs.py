"""Programs that tests need beside the project's environment: a test whose program is missing is
skipped, and fails where `CI=true` requires all of them."""

from __future__ import annotations

import os
import shutil

import pytest

IS_CI = os.environ.get("CI") == "true"


def needs_tools(*names: str) -> pytest.MarkDecorator:
    """Skips where a program is not on the PATH, naming it."""
    missing = [name for name in names if shutil.which(name) is None]
    reason = f"not on the PATH: {', '.join(missing)}"
    return pytest.mark.skipif(bool(missing) and not IS_CI, reason=reason)


def find_program(name: str) -> str:
    """The path of a program; skips the running test without it."""
    path = shutil.which(name)
    if path is None:
        (pytest.fail if IS_CI else pytest.skip)(f"not on the PATH: {name}")
    return path


needs_redis = needs_tools("redis-server")
