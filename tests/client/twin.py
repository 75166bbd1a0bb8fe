"""Generates the asynchronous client from the synchronous one, so that they cannot drift.

    python -m tests.client.twin

Whatever drives a call becomes a coroutine, and every iterator an asynchronous one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "client" / "carry_client"
FILES = {"sync.py": "aio.py", "sync_stream.py": "aio_stream.py"}
GENERATED = "Generated from the synchronous client by `python -m tests.client.twin`."
SUBSTITUTIONS = (
    (r"(The client|A stream of the client): `", r"\1 for an event loop: `"),
    (r"(?:They|It) only drives? the calls of[^\"]*", f"{GENERATED}\n"),
    (r"\bsync_stream\b", "aio_stream"),
    (
        r"A service and its models may be used by any number of threads; a stream by one at a time",
        "A service is used in one event loop, and a stream by one task at a time",
    ),
    (r"which one thread or task uses at a time", "which one task uses at a time"),
    (r"(?<![\w.])(Carry|Model|Stream|Driver)\b(?!-)", r"Async\1"),
    (r"\b(Source|ReplayFrom)\b", r"Async\1"),
    (r"sync_driver", "aio_driver"),
    (r"__(enter|exit)__", r"__a\1__"),
    (r"\bIterator\b", "AsyncIterator"),
    (r"yield from (.*)\n", r"async for each in \1:\n            yield each\n"),
    (r"(self\._driver\.(?:run|send|close)\(|self\.close\()", r"await \1"),
)
METHOD = re.compile(r"^    def .*?(?=^    (?:def|@)|^class |\Z)", re.MULTILINE | re.DOTALL)


def async_twin(source: str) -> str:
    """The asynchronous text of the synchronous one, formatted."""
    for pattern, replacement in SUBSTITUTIONS:
        source = re.sub(pattern, replacement, source)
    source = METHOD.sub(_as_coroutine, source)
    return _ruff("format", text=_ruff("check", "--quiet", "--fix", "--select", "I", text=source))


def _ruff(*command: str, text: str) -> str:
    options = ("--stdin-filename", str(PACKAGE / "aio.py"), "-")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, *options],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def _as_coroutine(method: re.Match[str]) -> str:
    waits = re.search(r"\bawait |\basync for |def __a", method[0])
    return method[0].replace("    def ", "    async def ", 1) if waits else method[0]


if __name__ == "__main__":
    for source, twin in FILES.items():
        (PACKAGE / twin).write_text(async_twin((PACKAGE / source).read_text()))
