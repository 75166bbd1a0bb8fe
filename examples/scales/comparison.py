"""Compares encodings of one network, on the meters it was trained on and on others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from examples.scales.data import HOURS, meters
from models.artifact.artifact import Artifact
from models.decoding.losses import score_forecast
from models.errors import SpecError
from models.events.schema import NumericField
from models.spec.heads import ForecastHead
from models.spec.layout import output_spec
from models.spec.model import ModelSpec, schema_of
from models.training.data import Streams, split_of, streams_of, without_normalisation
from models.training.evaluate import run_chunks, scored_rows
from models.training.scores import score_outputs, stream_scales
from models.training.trainer import train

Floats = NDArray[np.float64]

OTHER_SEED = 2
DRAWS = 2000
UNFITTED = {"mean": None, "std": None}
HEADER = """Pinball loss in deviations of each meter, then the mean over meters; in brackets the
difference to the first row, its 95% interval over meters.

| encoding | meters of the training, last 25% | other meters, last 25% |
| --- | --- | --- |
"""


class _Table(NamedTuple):
    """Events to score.

    Attributes:
        at: int64 [n], the events of the test set.
        scale: float64 [n], the deviation of each event's stream before it, in units.
    """

    streams: Streams
    at: NDArray[np.int64]
    scale: Floats


def comparison_file(artifact: Artifact, frame: pl.DataFrame) -> dict[str, bytes]:
    """The comparison as `scales.md`."""
    tables = [_table(artifact.spec, data) for data in (frame, meters(OTHER_SEED, name="other"))]
    losses = {
        "running mean and deviation, and season": [_losses(artifact, table) for table in tables]
    }
    for name, changed in _encodings(artifact.spec).items():
        with TemporaryDirectory() as folder:
            other = train(changed, frame, Path(folder) / "model", quiet=True).artifact
            losses[name] = [_losses(other, table) for table in tables]
    losses["seasonal naive"] = [_naive(artifact.spec, table) for table in tables]
    return {"scales.md": _markdown(losses).encode()}


def _encodings(spec: ModelSpec) -> dict[str, ModelSpec]:
    """The same model, with other encodings of its numbers."""
    return {
        "running mean and deviation": _with_fields(spec, {"season_events": None}),
        "logarithms of all training data, and season": _with_fields(
            without_normalisation(spec), {**UNFITTED, "transform": "signed_log1p"}
        ),
        "all training data, and season": _with_fields(without_normalisation(spec), UNFITTED),
    }


def _with_fields(spec: ModelSpec, update: Mapping[str, str | None]) -> ModelSpec:
    fields = tuple(
        field.model_copy(update=update) if isinstance(field, NumericField) else field
        for field in schema_of(spec).fields
    )
    return spec.model_copy(update={"events": schema_of(spec).model_copy(update={"fields": fields})})


def _table(spec: ModelSpec, frame: pl.DataFrame) -> _Table:
    streams = streams_of(spec, frame)
    at = scored_rows(streams, split_of(spec).test)
    return _Table(streams, at, _deviations(spec, streams)[at])


def _losses(artifact: Artifact, table: _Table) -> Floats:
    """The mean loss of each stream."""
    spec, (head, *_) = artifact.spec, artifact.spec.heads
    outputs = output_spec(spec).by_name(run_chunks(artifact, table.streams))
    columns = table.streams.columns
    scored = score_outputs(spec, head, outputs[head.name], columns, {}, table.at)
    return _by_stream(table, scored.losses["pinball"])


def _naive(spec: ModelSpec, table: _Table) -> Floats:
    """The value a day before, with quantiles of the training errors in deviations."""
    head = spec.heads[0]
    if not isinstance(head, ForecastHead):
        raise SpecError(f"head {head.name!r}: expected a forecast")
    (target,) = head.targets
    values = table.streams.columns.values[target]
    train_rows = scored_rows(table.streams, None, split_of(spec).validate)
    age = np.concatenate([np.arange(stop - start) for start, stop in table.streams.spans])
    errors = (values - np.roll(values, HOURS)) / _deviations(spec, table.streams)
    spread = np.quantile(errors[train_rows[age[train_rows] >= HOURS]], head.quantiles)
    forecasts = values[table.at - HOURS, None] + spread * table.scale[:, None]
    truth = values[table.at, None]
    scored = score_forecast(head.quantiles, forecasts[:, None, :], truth)
    return _by_stream(table, scored.losses["pinball"])


def _deviations(spec: ModelSpec, streams: Streams) -> Floats:
    """The deviation of each event's stream before it, in units, [rows]."""
    ((name, scales),) = stream_scales(spec, streams).items()
    field = schema_of(spec).field(name)
    if not isinstance(field, NumericField) or field.std is None:
        raise SpecError(f"field {name!r}: expected a fitted numeric field")
    return scales * field.std


def _by_stream(table: _Table, losses: Floats) -> Floats:
    scaled = losses / table.scale
    spans = table.streams.spans
    return np.array([scaled[(table.at >= a) & (table.at < b)].mean() for a, b in spans])


def _markdown(losses: Mapping[str, list[Floats]]) -> str:
    random = np.random.default_rng(0)
    text, first = HEADER, next(iter(losses.values()))
    for name, each in losses.items():
        cells = []
        for own, base in zip(each, first, strict=True):
            cell = f"{own.mean():.3f}"
            if own is not base:
                draws = (own - base)[random.integers(len(own), size=(DRAWS, len(own)))].mean(axis=1)
                low, high = np.quantile(draws, [0.025, 0.975])
                cell += f" ({low:+.3f} to {high:+.3f})"
            cells.append(cell)
        text += f"| {name} | {' | '.join(cells)} |\n"
    return text
