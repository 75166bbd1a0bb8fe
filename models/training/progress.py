"""Progress of long commands: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

LINE_EVERY_S = 5.0

Advance = Callable[[float, str], None]
"""Called with what is done so far, of the total, and a note."""


class Progress:
    """What a command prints while it works.

    Args:
        console: where to; a quiet one prints nothing.
        now_s: clock of the lines.
    """

    def __init__(self, console: Console, now_s: Callable[[], float] = time.monotonic):
        self._console = console
        self._now_s = now_s

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Advance]:
        """Show the progress of one task; yields what is to be called as it advances."""
        if self._console.is_terminal and not self._console.quiet:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            with Bars(*columns, console=self._console, transient=True) as bars:
                task = bars.add_task(title, total=total, note="")
                yield lambda done, note: bars.update(task, completed=done, note=note)
            return
        printed_s = self._now_s()

        def advance(done: float, note: str) -> None:
            nonlocal printed_s
            if self._now_s() - printed_s >= LINE_EVERY_S:
                printed_s = self._now_s()
                share = f" {100 * min(1.0, done / total):.0f}%" if done else ""
                self.say(f"{title}{share}: {note}")

        yield advance
