"""Responsiveness under load: the work that a health check waits for, and memory growth."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

EVERY_S = 0.005
CPUCLOCK_SCHED = 2
"""Of Linux: with a pid, the id of the clock of a process's processor time, in nanoseconds."""


class Health:
    """Polls `/health/live` on a separate connection.

    What a check waits for is measured by the processor time of the workers: how long it takes
    depends on what else the machine does.

    Args:
        workers: the pids of the service's workers.

    Attributes:
        most_work_s: most processor time that the workers used between a check and its reply.
        answers: number of replies.
    """

    def __init__(self, url: str, workers: Sequence[int]):
        parts = urlsplit(url)
        self._address = parts.hostname or "", parts.port
        self._workers = workers
        self._ended = threading.Event()
        self.most_work_s = 0.0
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
                before_s = self._work_s()
                connection.request("GET", "/health/live")
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 200
                self.most_work_s = max(self.most_work_s, self._work_s() - before_s)
                self.answers += 1
        except Exception as error:
            self.failures.append(error)
        finally:
            connection.close()

    def _work_s(self) -> float:
        """Processor time of the workers until now."""
        return sum(time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED) for pid in self._workers)


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
