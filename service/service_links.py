"""The variables that Kubernetes sets in pods for a Service named `carry` or `carry-...`."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SERVICE_LINK = re.compile(
    r"""CARRY (_[A-Z0-9_]+)? (
      _SERVICE_HOST=[0-9a-fA-F.:]+
    | _SERVICE_PORT (_[A-Z0-9_]+)? =\d+
    | _PORT (_\d+_[A-Z]+)? =[a-z]+://.+
    | _PORT_\d+_[A-Z]+_ (PROTO=[a-z]+ | PORT=\d+ | ADDR=[0-9a-fA-F.:]+)
    )""",
    re.VERBOSE,
).fullmatch


def service_links(environ: Mapping[str, str]) -> list[str]:
    """The variables that Kubernetes sets in pods for a Service named `carry` or `carry-...`.

    They are not settings, although they have the prefix, and `CARRY_PORT` the name of a setting.
    """
    return sorted(name for name, value in environ.items() if is_service_link(name, value))


def is_service_link(name: str, value: str) -> bool:
    """Whether a variable is one of these."""
    return _SERVICE_LINK(f"{name}={value}") is not None
