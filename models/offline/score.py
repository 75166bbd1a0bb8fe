"""`carry score`: the outputs for every event of a file, as the service would answer them.

The file is read in pieces. Each stream's state, clock and position carry over to the next, resets
included, so that the outputs do not depend on how the file is cut. Memory holds one piece and a
state per stream.

The events of a stream are processed in the order of the file, as a service would receive them.
Rejected are models whose outputs depend on the cuts (`chunking` other than invisible, and blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.artifact.artifact import Artifact, load_artifact
from models.errors import DataError, SpecError
from models.events.columns import EventColumns
from models.events.encode import Clock, event_times
from models.events.frame import columns_from_frame
from models.offline.parts import Parts, ScoringProgress, StreamStates
from models.offline.runner import OrderedEvents, Runner
from models.offline.step import FloatArray
from models.spec.model import schema_of
from models.spec.resets import find_resets, gaps_since_latest_ms, segment_numbers
from models.spec.state import State
from models.training.files import read_batches

POSITION = "position"
ROWS_PER_PIECE = 65_536
CHUNK, BATCH = 64, 256
"""Events and streams of one call of the network."""

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
    for frame in read_batches(data, artifact.spec, rows_per_piece, skip=scorer.rows):
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
            OrderedEvents(name, _select(columns, rows), *self._before(name))
            for name, rows in rows_of.items()
        ]
        for part in parts:
            self._count_out_of_order(part)
        try:
            outputs, states = self._runner.run(parts, chunk=CHUNK, batch=BATCH)
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
            at = "" if error.index is None else f", row {self.rows + error.index + 1}"
            raise DataError(
                field=error.field, expected=f"{self._source}{at}: {error.expected}", got=error.got
            ) from error

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


def _select(columns: EventColumns, rows: NDArray[np.int64]) -> EventColumns:
    return EventColumns(
        len(rows),
        {name: array[rows] for name, array in columns.present.items()},
        {name: array[rows] for name, array in columns.values.items()},
    )
