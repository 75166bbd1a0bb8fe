"""Writes log lines to stderr, immediately or buffered.

`write` flushes the buffer and its line before it returns, so lines keep their order. `buffer`
delays a line for up to `FLUSH_INTERVAL_S` while the event loop runs; the buffer is also flushed at
exit, but lost if the process is killed. Safe from any thread. Nothing here raises.
"""

from __future__ import annotations

import asyncio
import atexit
import sys
import threading

FLUSH_INTERVAL_S = 0.05
MAX_BUFFERED_LINES = 200


class StderrWriter:
    """Buffered writer of lines to stderr; one per process."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may log while the event loop's thread is writing.
        self._lock = threading.RLock()
        self._lines: list[str] = []
        atexit.register(self.flush)

    def write(self, line: str) -> None:
        """Write a line immediately."""
        with self._lock:
            self._lines.append(line)
            self.flush()

    def buffer(self, line: str) -> None:
        """Write a line soon, or immediately outside of the event loop's thread."""
        with self._lock:
            self._lines.append(line)
            if len(self._lines) == 1:
                try:
                    asyncio.get_running_loop().call_later(FLUSH_INTERVAL_S, self.flush)
                except RuntimeError:
                    self.flush()
            elif len(self._lines) >= MAX_BUFFERED_LINES:
                self.flush()

    def flush(self) -> None:
        """Write the buffered lines."""
        with self._lock:
            lines, self._lines = self._lines, []
            if not lines:
                return
            lines.append("")
            # Looked up each time, to follow a replaced stderr.
            stream = sys.stderr
            try:
                stream.write("\n".join(lines))
                stream.flush()
            except (OSError, ValueError):
                # stderr is closed: the failure cannot be reported anywhere.
                return
