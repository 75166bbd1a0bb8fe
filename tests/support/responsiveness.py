"""Responsiveness under load: slowest health check and memory growth of a service."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

EVERY_S = 0.005


class Health:
    """Polls `/health/live` on a separate connection.

    Attributes:
        slowest_s: slowest reply, in seconds.
        answers: number of replies.
    """

    def __init__(self, url: str):
        parts = urlsplit(url)
        self._address = parts.hostname or "", parts.port
        self._ended = threading.Event()
        self.slowest_s = 0.0
        self.answers = 0
        self.failures: list[BaseException] = []

    @contextmanager
    def watched(self) -> Iterator[Health]:
        """While the block runs."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()

    def _watch(self) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=60)
        try:
            while not self._ended.wait(EVERY_S):
                began_s = time.monotonic()
                connection.request("GET", "/health/live")
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 200
                self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
                self.answers += 1
        except Exception as error:
            self.failures.append(error)
        finally:
            connection.close()


class Memory:
    """The resident memory of a process, in bytes, since this was made (Linux)."""

    def __init__(self, pid: int):
        self._folder = Path(f"/proc/{pid}")
        (self._folder / "clear_refs").write_text("5")
        self.before = self._status("VmRSS")

    @property
    def growth(self) -> int:
        """The largest it was, above what it was at first."""
        return self._status("VmHWM") - self.before

    def _status(self, name: str) -> int:
        for line in (self._folder / "status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
        raise LookupError(name)
