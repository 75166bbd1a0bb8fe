"""Parts of an output file, with a checkpoint, so that an interrupted run can be resumed.

Parts and checkpoint are in a directory beside the output, and become one file at the end. A
checkpoint names the parts that it covers; later ones are written again. It belongs to one model and
one input file; others are rejected.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from models.artifact.files import replace_file
from models.errors import ArtifactError, DataError
from models.spec.state import State

KINDS = (".parquet", ".csv")
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_EVERY_S = 20.0

StreamStates = dict[str, tuple[State, int]]
"""By stream, its state and its position."""


class ScoringProgress(NamedTuple):
    """How far the input is scored.

    Attributes:
        rows: number of scored rows.
        streams: the streams after them.
        out_of_order: events with an earlier timestamp than one before them in their session.
    """

    rows: int
    streams: StreamStates
    out_of_order: int


class Parts:
    """The parts of one output.

    Args:
        out: the output, `.parquet` or `.csv`.
        key: what the outputs depend on besides the data.
        data: the input file.
        now_s: a monotonic clock.
    """

    def __init__(
        self, out: Path, key: str, data: Path, now_s: Callable[[], float] = time.monotonic
    ):
        self._out = out
        self._folder = out.parent / f".{out.name}.parts"
        self._now_s = now_s
        self._written = 0
        self._saved_s = now_s()
        if out.suffix.lower() not in KINDS:
            raise DataError(
                expected=f"{out}: a file ending in {', '.join(KINDS)}", got=repr(out.suffix)
            )
        if not data.is_file():
            raise DataError(expected="an existing file", got=str(data))
        status = data.stat()
        self._key = f"{key} {status.st_size} {status.st_mtime_ns}"

    def open(self, *, resume: bool, overwrite: bool) -> ScoringProgress:
        """Start, or continue from the checkpoint.

        Raises:
            ArtifactError: the output is there already, or there is no checkpoint that fits.
        """
        if self._out.exists() and not overwrite:
            raise ArtifactError(f"{self._out}: exists; expected a new path, or --overwrite")
        if resume:
            return self._read_checkpoint()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        return ScoringProgress(0, {}, 0)

    def add(self, part: pl.DataFrame, progress: ScoringProgress) -> None:
        """Write the next part, and every few seconds a checkpoint."""
        part.write_parquet(self._part(self._written))
        self._written += 1
        if self._now_s() - self._saved_s >= CHECKPOINT_EVERY_S:
            self._write_checkpoint(progress)
            self._saved_s = self._now_s()

    def finish(self) -> None:
        """Join the parts to the output, and remove them."""
        if self._written == 0:
            raise DataError(expected="at least one row of events", got="none")
        joined = self._folder / f"joined{self._out.suffix}"
        parts = pl.scan_parquet([self._part(number) for number in range(self._written)])
        if self._out.suffix.lower() == ".csv":
            parts.sink_csv(joined)
        else:
            parts.sink_parquet(joined)
        joined.replace(self._out)
        shutil.rmtree(self._folder)

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:06d}.parquet"

    def _write_checkpoint(self, progress: ScoringProgress) -> None:
        streams = progress.streams
        metadata = {
            "key": self._key,
            "rows": str(progress.rows),
            "out_of_order": str(progress.out_of_order),
            "parts": str(self._written),
            "names": json.dumps(list(streams)),
        }
        arrays: dict[str, NDArray[Any]] = {
            "floats": np.stack([state.floats for state, _ in streams.values()]),
            "ints": np.stack([state.ints for state, _ in streams.values()]),
            "positions": np.array([position for _, position in streams.values()], np.int64),
        }
        replace_file(self._folder / CHECKPOINT, save(arrays, metadata))

    def _read_checkpoint(self) -> ScoringProgress:
        path = self._folder / CHECKPOINT
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                floats, ints, positions = (
                    file.get_tensor(name) for name in ("floats", "ints", "positions")
                )
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{path}: there is no checkpoint to resume from; one is written every "
                f"{CHECKPOINT_EVERY_S:g} s"
            ) from error
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path}: expected a checkpoint, got {error}") from error
        if metadata.get("key") != self._key:
            raise ArtifactError(f"{path}: was made with another model or other data")
        self._written = int(metadata["parts"])
        names = json.loads(metadata["names"])
        states = map(State, floats, ints)
        return ScoringProgress(
            int(metadata["rows"]),
            dict(zip(names, zip(states, positions.tolist(), strict=True), strict=True)),
            int(metadata["out_of_order"]),
        )
