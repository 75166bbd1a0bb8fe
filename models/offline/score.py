"""`carry score`: the outputs for every event of a file, as the service would answer them.

The file is read in pieces. Each stream's state, clock and position carry over to the next, resets
included, so that the outputs do not depend on how the file is cut. Memory holds one piece and a
state per stream.

The events of a stream are processed in the order of the file, as a service would receive them.
Rejected are models whose outputs depend on the cuts (`chunking` other than invisible, and blocks).

Outputs are written in parts, with a checkpoint from which an interrupted run can be resumed, in a
directory beside the output, and become one file at the end. A checkpoint names the parts that it
covers; later ones are written again. It belongs to one model and one input file; others are
rejected.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.artifact.artifact import Artifact, load_artifact
from models.errors import ArtifactError, DataError, SpecError
from models.events.columns import EventColumns
from models.events.encode import Clock, event_times
from models.events.frame import columns_from_frame
from models.offline.runner import OrderedEvents, Runner
from models.offline.steps import FloatArray
from models.spec.model import schema_of
from models.spec.resets import find_resets, gaps_since_latest_ms, segment_numbers
from models.spec.state import State
from models.training.checkpoint import read_checkpoint, write_checkpoint
from models.training.files import read_batches

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
        states = [state for state, _ in progress.streams.values()]
        write_checkpoint(
            self._folder / CHECKPOINT,
            self._key,
            {
                "floats": np.stack([state.floats for state in states]),
                "ints": np.stack([state.ints for state in states]),
                "positions": np.array([at for _, at in progress.streams.values()], np.int64),
            },
            rows=str(progress.rows),
            out_of_order=str(progress.out_of_order),
            parts=str(self._written),
            names=json.dumps(list(progress.streams)),
        )

    def _read_checkpoint(self) -> ScoringProgress:
        arrays, metadata = read_checkpoint(self._folder / CHECKPOINT, self._key)
        self._written = int(metadata["parts"])
        names = json.loads(metadata["names"])
        states = map(State, arrays["floats"], arrays["ints"])
        positions = arrays["positions"].tolist()
        return ScoringProgress(
            int(metadata["rows"]),
            dict(zip(names, zip(states, positions, strict=True), strict=True)),
            int(metadata["out_of_order"]),
        )


POSITION = "position"
ROWS_PER_PIECE = 65_536

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """Result of scoring a file.

    Attributes:
        events: rows of the file.
        streams: streams in it.
        out_of_order: events with an earlier timestamp than one before them in their session.
    """

    events: int
    streams: int
    out_of_order: int


def score_file(
    path: Path,
    data: Path,
    out: Path,
    *,
    stream: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    rows_per_piece: int = ROWS_PER_PIECE,
    advance: Advance = lambda rows: None,
) -> ScoreResult:
    """Write the outputs for a file of events.

    Args:
        path: the artifact's directory.
        data: the events, as `carry train` takes them.
        out: `.parquet` or `.csv`; one row per row of `data`, in its order.
        stream: column with the name of each row's stream; that of training by default.
        resume: continue an interrupted run.
        overwrite: replace `out`.
        rows_per_piece: rows that are read and computed together.
        advance: called with the rows done so far.

    Raises:
        ModelsError: artifact or data are rejected.
    """
    artifact = load_artifact(path)
    name = _check(artifact, stream)
    parts = Parts(out, f"{artifact.fingerprint.hex()} {name}", data)
    progress = parts.open(resume=resume, overwrite=overwrite)
    scorer = _Scorer(artifact, name, str(data), progress)
    for frame in read_batches(data, schema_of(artifact.spec), rows_per_piece, skip=scorer.rows):
        parts.add(scorer.score(frame), scorer.progress)
        advance(scorer.rows)
    parts.finish()
    rows, streams, out_of_order = scorer.progress
    return ScoreResult(rows, len(streams), out_of_order)


def _check(artifact: Artifact, stream: str | None) -> str:
    """Reject a model that cannot be scored; returns the stream's column."""
    spec = artifact.spec
    schema_of(spec)
    if spec.chunking != "invisible" or spec.blocks is not None:
        raise SpecError(
            f"model {spec.name!r}: expected outputs that do not depend on how a stream is cut, but "
            "this network sees a chunk as a whole or looks ahead; `carry evaluate` scores it, and "
            "`POST .../predict` takes whole sequences"
        )
    name = stream or (spec.training.stream if spec.training else None)
    if name is None:
        raise SpecError(
            f"model {spec.name!r}: was not trained by `carry train`: expected `--stream` with the "
            "column that names each row's stream"
        )
    return name


class _Scorer:
    """Computes pieces of the file, one after another."""

    def __init__(self, artifact: Artifact, stream: str, source: str, progress: ScoringProgress):
        self._artifact, self._schema = artifact, schema_of(artifact.spec)
        self._runner = Runner(artifact.spec, artifact.weights)
        self._stream, self._source = stream, source
        self._streams: StreamStates = dict(progress.streams)
        self.rows = progress.rows
        self._out_of_order = progress.out_of_order

    @property
    def progress(self) -> ScoringProgress:
        """How far the input is scored."""
        return ScoringProgress(self.rows, self._streams, self._out_of_order)

    def score(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The outputs of the next rows, in their order."""
        columns = self._read(frame)
        rows_of = self._rows_by_stream(frame)
        parts = [
            OrderedEvents(name, columns.take(rows), *self._before(name))
            for name, rows in rows_of.items()
        ]
        for part in parts:
            self._count_out_of_order(part)
        try:
            outputs, states = self._runner.run(parts)
        except DataError as error:
            raise DataError(
                field=error.field,
                expected=f"{self._source}, after row {self.rows}: {error.expected}",
                got=error.got,
            ) from error
        packed = np.empty((frame.height, self._artifact.outputs.size), np.float32)
        positions = np.empty(frame.height, np.int64)
        results = zip(rows_of.items(), parts, outputs, states, strict=True)
        for (name, rows), part, output, state in results:
            if not (np.isfinite(output).all() and np.isfinite(state.floats).all()):
                raise DataError(
                    expected=f"{self._source}, stream {name!r}, from row "
                    f"{self.rows + rows[0] + 1}: finite outputs and states",
                    got="NaN or infinity",
                )
            packed[rows] = output
            positions[rows] = part.position + np.arange(len(rows))
            self._streams[name] = (state, part.position + len(rows))
        self.rows += frame.height
        return self._table(frame, positions, packed)

    def _read(self, frame: pl.DataFrame) -> EventColumns:
        if self._stream not in frame.columns:
            raise DataError(
                field=self._stream,
                expected=f"{self._source}: a column of that name",
                got=f"{frame.columns}",
            )
        try:
            return columns_from_frame(self._schema, frame)
        except DataError as error:
            raise error.in_table(self._source, self.rows) from error

    def _rows_by_stream(self, frame: pl.DataFrame) -> Mapping[str, NDArray[np.int64]]:
        names = frame[self._stream].cast(pl.String)
        if names.null_count():
            row = int(names.is_null().arg_true()[0])
            raise DataError(
                field=self._stream,
                expected=f"{self._source}, row {self.rows + row + 1}: a stream's name",
                got="none",
            )
        grouped = (
            pl.DataFrame({"name": names, "row": np.arange(frame.height)})
            .group_by("name", maintain_order=True)
            .agg("row")
        )
        return {name: rows.to_numpy() for name, rows in zip(*grouped.get_columns(), strict=True)}

    def _before(self, name: str) -> tuple[State, int]:
        return self._streams.get(name, (self._artifact.state.initial(), 0))

    def _count_out_of_order(self, part: OrderedEvents) -> None:
        # counted here, since a reset takes the clock's own count with it
        clock = Clock.from_ints(self._artifact.state, part.state.ints)
        times = event_times(self._schema, part.columns, clock)
        if times is not None:
            steps = len(part.columns)
            resets = find_resets(self._artifact.spec.resets, steps, part.position, times=times)
            there = times.present
            numbers = segment_numbers(steps, resets)[there]
            gaps = gaps_since_latest_ms(times.times_ms[there], numbers, times.last_ms)
            self._out_of_order += int(np.count_nonzero(gaps < 0))

    def _table(
        self, frame: pl.DataFrame, positions: NDArray[np.int64], packed: FloatArray
    ) -> pl.DataFrame:
        time = self._schema.timestamp
        kept = [self._stream]
        if time is not None and time.name in frame.columns and time.name != self._stream:
            kept.append(time.name)
        table = {name: frame[name] for name in kept}
        table[POSITION] = pl.Series(positions)
        outputs = self._artifact.outputs
        for output in outputs.outputs:
            columns = outputs.by_name(packed)[output.name].reshape(frame.height, -1)
            table.update(zip(output.column_names(), map(pl.Series, columns.T), strict=True))
        return pl.DataFrame(table)
