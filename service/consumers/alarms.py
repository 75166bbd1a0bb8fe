"""Describes alarms in the outputs that open or close them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from models.artifact.artifact import Artifact
from models.detection.alarms import CLOSED, OPENED
from models.detection.causes import Causes
from service.core.values import FloatRows
from service.store.base import decode_stream

CHANGES: Final = {OPENED: "opened", CLOSED: "closed"}


class AlarmFields:
    """Fields of outputs that open or close an alarm: which of both, severity, cause.

    Attributes:
        output: the name of the output of alarms.
    """

    def __init__(self, artifact: Artifact, head: str):
        self.output = f"{head}.alarm"
        self._outputs, self._causes = artifact.outputs, Causes(artifact.spec)
        self._column = artifact.outputs.slices[self.output].start
        self._probability = artifact.outputs.slices[f"{head}.probability"].start
        self._names = [f"{head}.{name}" for name in ("share", "deviation", "residual")]

    def of_chunk(self, rows: FloatRows, state: bytes) -> dict[int, tuple[str, ...]]:
        """The fields by the index of the row: `alarm`, and if known `severity` and `cause`.

        Args:
            rows: [T, O], the outputs of a chunk.
            state: encoded, after the chunk; it has the record of the latest alarm.
        """
        codes = rows[:, self._column]
        changed = np.flatnonzero(np.isin(codes, list(CHANGES))).tolist()
        if not changed:
            return {}
        latest = self._causes.of_state(decode_stream(state).state.floats)
        start = max(np.flatnonzero(codes == OPENED), default=0)
        fields: dict[int, tuple[str, ...]] = {}
        earlier: tuple[str, ...] = ()
        for row, following in zip(changed, [*changed[1:], len(codes)], strict=True):
            code = int(codes[row])
            fields[row] = ("alarm", CHANGES[code])
            if latest is not None and row >= start:
                fields[row] += ("severity", f"{latest.severity:.2f}", "cause", latest.cause.words)
                continue
            if code == OPENED:
                stop = row + 1 if latest is None else following
                earlier = self._of_rows(rows[row:stop], has_severity=latest is not None)
            if code == OPENED or latest is not None:
                fields[row] += earlier
        return fields

    def _of_rows(self, rows: FloatRows, *, has_severity: bool) -> tuple[str, ...]:
        """The same of an alarm whose record the state does not have, by its events."""
        severity = self._causes.severity_of(float(np.min(rows[:, self._probability])))
        fields = ("severity", f"{severity:.2f}") if has_severity else ()
        values = self._named(rows[0])
        if values[0] is None:
            return fields
        return (*fields, "cause", self._causes.of_event(*values).words)

    def _named(self, row: FloatRows) -> list[Any]:
        slices = self._outputs.slices
        return [row[slices[name]] if name in slices else None for name in self._names]


def describe_alarm(output: Mapping[str, Any]) -> str | None:
    """A line about an output that opens or closes an alarm; None for others.

    The name of the stream is marked as code: chat tools would find emoji, mentions and links in it.
    """
    if "alarm" not in output:
        return None
    line = f"`{output.get('stream')}`: alarm {output['alarm']}"
    if "severity" in output:
        line += f", severity {output['severity']}"
    return f"{line}: {output['cause']}" if "cause" in output else line
