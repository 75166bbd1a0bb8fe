"""Lines on their way to stderr: at once, or a few gathered first.

A line that is `write`n is there when the call returns, after all that was gathered before it, so
that lines keep their order. One that is `gather`ed waits for others, a twentieth of a second at
most while the event loop runs, and is written at exit; a killed process loses that much. Safe
from any thread. Nothing here raises.
"""

from __future__ import annotations

import asyncio
import atexit
import sys
import threading

GATHER_S = 0.05
MOST_GATHERED = 200


class StderrLines:
    """One per process."""

    def __init__(self) -> None:
        # reentrant: a signal's handler may log while the loop's thread is writing
        self._lock = threading.RLock()
        self._gathered: list[str] = []
        atexit.register(self.flush)

    def write(self, line: str) -> None:
        """Write a line now."""
        with self._lock:
            self._gathered.append(line)
            self.flush()

    def gather(self, line: str) -> None:
        """Write a line soon. From the event loop's thread; elsewhere it is written now."""
        with self._lock:
            self._gathered.append(line)
            if len(self._gathered) == 1:
                try:
                    asyncio.get_running_loop().call_later(GATHER_S, self.flush)
                except RuntimeError:
                    self.flush()
            elif len(self._gathered) >= MOST_GATHERED:
                self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        with self._lock:
            lines, self._gathered = self._gathered, []
            if not lines:
                return
            lines.append("")
            # looked up each time, so that a replaced stderr is followed
            stream = sys.stderr
            try:
                stream.write("\n".join(lines))
                stream.flush()
            except (OSError, ValueError):
                # stderr is gone; there is nowhere left to say so
                return
