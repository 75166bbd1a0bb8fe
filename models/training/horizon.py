"""Scores a decoder's forecasts on held-out events by step of the horizon, with naive baselines.

From the state after every `stride`-th event the decoder forecasts along its medians, given the
known future covariates and nothing else. Predictions are compared with the observed values,
in the fields' own units:

    last value      the last one observed
    seasonal naive  the one at the same time a day before, the latest such that is known; where
                    a day is a whole number of steps

Both become quantiles through the quantiles of their own errors on training events, each step
of the horizon by itself. All three are scored on the same steps: those where each has a value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.decoding.forecasts import Distribution, decoder_of, start
from models.decoding.losses import Floats, pinball
from models.events.calendar import DAY_MS
from models.offline.steps import Step, open_step
from models.spec.decoder import known_columns, strip_decoder_prefix
from models.spec.layout import network_state
from models.spec.model import ModelSpec
from models.training.data import Streams
from models.training.decoder_training import steps_ahead

STRIDE = 7
"""Events between two forecasts; no divisor of a day's hours, so that every hour has its turn."""
LANES = 64
"""Streams that run side by side."""
MODEL, LAST_VALUE, SEASONAL = "model", "last value", "seasonal naive"

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Ahead:
    """The steps that follow rows of a table.

    Attributes:
        at: int64 [A], the rows after which a forecast begins.
        counts: bool [A, H], the steps that exist and lie on the wanted side.
    """

    at: Rows
    counts: NDArray[np.bool_]

    @property
    def rows(self) -> Rows:
        """The rows of the forecast steps, int64 [A, H]; 0 if there is none."""
        rows = self.at[:, np.newaxis] + 1 + np.arange(self.counts.shape[1])
        return np.asarray(np.where(self.counts, rows, 0), np.int64)


def horizon_report(
    artifact: Artifact,
    streams: Streams,
    rows: NDArray[np.float32],
    from_key: int | None,
    train_before: int | None = None,
) -> dict[str, Any]:
    """Score a model's decoder.

    Args:
        artifact: a model with a decoder.
        streams: the events.
        rows: float32 [rows, F], the same encoded.
        from_key: moment from which forecast steps are scored; None scores all of them.
        train_before: moment before which the baselines learn their errors; without it they
            give points alone.

    Returns:
        `horizon`, `stride`, `forecasts`, and `targets`: by name, `steps` (how many were scored,
        by step of the horizon), `mae`, `pinball` (by model, a list over the horizon) and
        `below` (by quantile, the share of values at or below it, over the horizon). A value is
        None if nothing was scored. Empty if no forecast could be scored.
    """
    spec = artifact.spec
    decoder, _, _ = decoder_of(spec)
    anchors = ahead_of(spec, streams, from_key, None, STRIDE)
    if len(anchors.at) == 0:
        return {}
    points, quantiles = forecasts_at(artifact, streams, rows, anchors, STRIDE)
    origins = None
    if train_before is not None:
        origins = ahead_of(spec, streams, None, train_before, 1)
    levels = np.array(decoder.head.quantiles)
    targets = {}
    for index, name in enumerate(decoder.targets):
        values = np.where(streams.columns.present[name], streams.columns.values[name], np.nan)
        truth = np.where(anchors.counts, values[anchors.rows], np.nan)
        forecasts = {MODEL: (points[..., index], quantiles[..., index, :])}
        for baseline in (LAST_VALUE, SEASONAL):
            near = _baseline(spec, streams, values, anchors, baseline)
            if near is None:
                continue
            spread = np.full((near.shape[1], len(levels)), np.nan)
            if origins is not None and len(origins.at):
                naive = _baseline(spec, streams, values, origins, baseline)
                if naive is not None:
                    errors = np.where(origins.counts, values[origins.rows], np.nan) - naive
                    spread = _quantiles(errors, levels)
            forecasts[baseline] = (near, near[..., np.newaxis] + spread)
        targets[name] = _score_forecasts(truth, forecasts, levels)
    return {
        "horizon": decoder.max_horizon,
        "stride": STRIDE,
        "forecasts": len(anchors.at),
        "targets": targets,
    }


def horizon_lines(report: dict[str, Any]) -> list[str]:
    """The report as a Markdown table per target: mean absolute errors by step."""
    lines: list[str] = []
    if not report:
        return lines
    horizon = report["horizon"]
    steps = sorted({1, *(horizon * part // 4 for part in (1, 2, 3, 4))} - {0})
    for name, target in report["targets"].items():
        rows = {}
        for model, values in target["mae"].items():
            present = [value for value in values if value is not None]
            mean = float(np.mean(present)) if present else None
            rows[model] = [_cell(value) for value in (*(values[at - 1] for at in steps), mean)]
        forecasts = f"{report['forecasts']:,} forecasts"
        title = f"{name}, by step ahead ({forecasts}), MAE (lower is better)"
        lines += table_lines(title, [*map(str, steps), "all"], rows)
    return lines


def table_lines(title: str, headers: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """A Markdown table of named rows, below its title."""
    lines = ["", title, "", f"| | {' | '.join(headers)} |", "| --- |" + " --- |" * len(headers)]
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def ahead_of(
    spec: ModelSpec, streams: Streams, from_key: int | None, before_key: int | None, stride: int
) -> Ahead:
    """Every `stride`-th row of each session after which some step counts."""
    decoder, _, _ = decoder_of(spec)
    following = np.append(streams.split_keys[1:], streams.split_keys[-1:])
    side = streams.has_next.copy()
    if from_key is not None:
        side &= following >= from_key
    if before_key is not None:
        side &= following < before_key
    ahead = steps_ahead(side, streams.moments_ms, decoder.step_ms)
    regular = np.zeros(streams.events, np.bool_)
    for begin, end in streams.sessions:
        regular[begin + stride - 1 : end : stride] = True
    at = np.flatnonzero(regular & (ahead > 0))
    return Ahead(at, np.arange(decoder.max_horizon) < ahead[at][:, np.newaxis])


def forecasts_at(
    artifact: Artifact,
    streams: Streams,
    rows: NDArray[np.float32],
    anchors: Ahead,
    stride: int,
) -> tuple[Floats, Floats]:
    """Points [A, H, D] and quantiles [A, H, D, Q] in units, as the service would give them."""
    spec = artifact.spec
    decoder, _, events = decoder_of(spec)
    if spec.decoder_network is None:
        raise TypeError(f"model {spec.name!r}: expected a network with a decoder")
    floats = _states(spec, open_step(spec, artifact.weights), streams, rows, anchors.at, stride)
    distribution = Distribution(spec)
    state, previous = start(spec, floats)
    covariates = rows[:, [events.column_index[name] for name in known_columns(spec, decoder)]]
    step = open_step(spec.decoder_network, strip_decoder_prefix(artifact.weights))
    ones = np.ones(len(floats), np.int32)
    points, quantiles = [], []
    for step_rows in anchors.rows.T:
        row = np.concatenate([previous, covariates[step_rows]], axis=1)
        outputs, state = step(row[:, np.newaxis], ones, state)
        predicted = distribution.quantiles(outputs[:, 0])
        point = distribution.point(predicted)
        previous = point.astype(np.float32)
        points.append(distribution.in_units(point))
        quantiles.append(distribution.in_units(predicted, axis=-2))
    return np.stack(points, 1).astype(np.float64), np.stack(quantiles, 1).astype(np.float64)


def _states(
    spec: ModelSpec,
    step: Step,
    streams: Streams,
    rows: NDArray[np.float32],
    at: Rows,
    stride: int,
) -> NDArray[np.float32]:
    """The encoder's states [A, N] after the rows `at`, each session run from its beginning."""
    size = network_state(spec).float_size
    place = np.full(streams.events, -1)
    place[at] = np.arange(len(at))
    collected = np.zeros((len(at), size), np.float32)
    for first in range(0, len(streams.sessions), LANES):
        group = streams.sessions[first : first + LANES]
        begins = np.array([begin for begin, _ in group])
        ends = np.array([end for _, end in group])
        state = np.zeros((len(group), size), np.float32)
        for consumed in range(0, int((ends - begins).max()), stride):
            lengths = np.clip(ends - begins - consumed, 0, stride).astype(np.int32)
            index = begins[:, np.newaxis] + consumed + np.arange(stride)
            index = np.minimum(index, ends[:, np.newaxis] - 1)
            _, state = step(rows[index], lengths, state)
            for slot in np.flatnonzero(lengths == stride):
                anchor = place[begins[slot] + consumed + stride - 1]
                if anchor >= 0:
                    collected[anchor] = state[slot]
    return collected


def _baseline(
    spec: ModelSpec, streams: Streams, values: Floats, anchors: Ahead, kind: str
) -> Floats | None:
    """A naive forecast of the steps [A, H]; NaN if it has none."""
    horizon = anchors.counts.shape[1]
    if kind == LAST_VALUE:
        latest = _latest(streams, values)
        return np.repeat(latest[anchors.at][:, np.newaxis], horizon, axis=1)
    decoder, _, _ = decoder_of(spec)
    if decoder.step_ms is None or DAY_MS % decoder.step_ms:
        return None
    season = DAY_MS // decoder.step_ms
    ahead = 1 + np.arange(horizon)
    back = season * -(-ahead // season)
    rows = anchors.at[:, np.newaxis] + ahead - back
    first = np.repeat([begin for begin, _ in streams.spans], [e - b for b, e in streams.spans])
    inside = rows >= first[anchors.at][:, np.newaxis]
    rows = np.where(inside, rows, 0)
    expected_ms = streams.moments_ms[anchors.at][:, np.newaxis] + (ahead - back) * decoder.step_ms
    same = inside & (streams.moments_ms[rows] == expected_ms)
    return np.where(same, values[rows], np.nan)


def _latest(streams: Streams, values: Floats) -> Floats:
    """At each row the latest value of its stream so far; NaN before any."""
    rows = np.arange(len(values))
    present_rows = np.where(np.isnan(values), -1, rows)
    latest = np.full(len(values), np.nan)
    for begin, end in streams.spans:
        last = np.maximum.accumulate(present_rows[begin:end])
        latest[begin:end] = np.where(last >= 0, values[np.maximum(last, 0)], np.nan)
    return latest


def _quantiles(errors: Floats, levels: Floats) -> Floats:
    """Quantiles of errors [A, H], by step: [H, Q]; NaN if there are none."""
    result = np.full((errors.shape[1], len(levels)), np.nan)
    for step, column in enumerate(errors.T):
        present = column[~np.isnan(column)]
        if len(present):
            result[step] = np.quantile(present, levels)
    return result


def _score_forecasts(
    truth: Floats, forecasts: dict[str, tuple[Floats, Floats]], levels: Floats
) -> dict[str, Any]:
    """Scores by model and step, of the values that all of them have."""
    compared = ~np.isnan(truth)
    for point, _ in forecasts.values():
        compared &= ~np.isnan(point)
    mae, pinballs = {}, {}
    for name, (point, quantiles) in forecasts.items():
        mae[name] = _means(np.abs(truth - point), compared)
        error = truth[..., np.newaxis] - quantiles
        loss = pinball(levels, error).mean(axis=-1)
        if not np.isnan(loss[compared]).all():
            pinballs[name] = _means(loss, compared)
    below = {
        str(level): _means((truth <= forecasts[MODEL][1][..., at]).astype(np.float64), compared)
        for at, level in enumerate(levels.tolist())
    }
    steps = np.count_nonzero(compared, axis=0).tolist()
    return {"steps": steps, "mae": mae, "pinball": pinballs, "below": below}


def _means(losses: Floats, compared: NDArray[np.bool_]) -> list[float | None]:
    """The mean of each step of the horizon; None if nothing was compared."""
    return [
        float(column[there].mean()) if there.any() else None
        for column, there in zip(losses.T, compared.T, strict=True)
    ]
