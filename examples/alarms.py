"""Scores alarms on a table of labelled anomalies, beside baselines.

    python -m examples.alarms MODEL LABELLED.csv EVENTS_PER_DAY

The table has the columns of the model and `anomaly`. The test part of every stream begins at
`TEST_FROM`; the model has an anomaly head, and its network was trained on events before that.
Detection has default options: a season if the first of these events have one, as `carry train`
finds it, and it is fitted to the last.
All thresholds are one for all streams, and an anomaly is found if an alarm opens in it. "Found at
equal false alarms" takes each method's most sensitive threshold with at most so many openings
outside the anomalies per stream and day. Baselines rank events by a tail of the stream's own past;
raw nats are the network's. The NAB score, of its standard profile, is that of openings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.artifact.artifact import load_artifact
from models.detection.alarms import OPENED, AlarmState, follow_alarm
from models.detection.fit import Stream, fit_detection
from models.detection.scoring import draw_streams, middle_95, score_streams, with_intervals
from models.detection.vus import runs
from models.spec.detection import AlarmSpec, DetectionFit, DetectionSpec
from models.spec.heads import AnomalyHead
from models.spec.layout import anomaly_size, detection_of, network_outputs, output_spec
from models.spec.model import ModelSpec, schema_of
from models.training.data import Streams, moment_ms, streams_of
from models.training.defaults import HOLD_EVENTS, resolve_detection, resolve_season
from models.training.detection_baselines import RAW_NATS, Parts, detection_baselines, own_past_nats
from models.training.evaluate import anomalous_events, detect, run_network

Floats = NDArray[np.float64]
Events = NDArray[np.int64]
TEST_FROM: Final = "2026-01-01T00:00:00Z"
VALIDATED: Final = 0.3
"""Share of the events before the test part that detection and thresholds are fitted to."""
RATES: Final = (0.05, 0.2, 1.0)
LEVELS: Final = (0.01, 0.001)
THRESHOLDS: Final = 400
DETECTION: Final = "detection"


class Tested(NamedTuple):
    """The test part of one stream.

    Attributes:
        start: first row of the stream.
        rows: rows of the test part among those of all streams.
        labels: bool [rows of the test part], whether each is anomalous.
        days: duration of its normal events, in days.
    """

    start: int
    rows: slice
    labels: NDArray[np.bool_]
    days: float


def tested_of(spec: ModelSpec, streams: Streams, day: float) -> list[Tested]:
    """The test part of each stream."""
    labels = anomalous_events(spec, streams, "anomaly")
    is_test = streams.moments_ms >= moment_ms(schema_of(spec), TEST_FROM, "TEST_FROM")
    found = []
    for start, stop in streams.spans:
        first = start + int(np.argmax(is_test[start:stop]))
        own = labels[first:stop]
        found.append(Tested(start, slice(first, stop), own, float((~own).sum()) / day))
    return found


def fitted(
    spec: ModelSpec, streams: Streams, outputs: NDArray[np.float32], parts: Parts, day: float
) -> tuple[ModelSpec, DetectionFit]:
    """The model with its detection fitted to the validation part."""
    detection, head, _ = detection_of(spec)
    first = network_outputs(spec).slices[head.name].stop
    rows = streams.encoded(schema_of(spec))
    parameters = outputs[:, first : first + anomaly_size(spec, head)]
    past = [slice(start, stop) for start, stop in streams.spans]
    past = [slice(p.start, p.start + 1 + np.flatnonzero(parts.validate[p])[-1]) for p in past]
    validated = [parts.validate[each] for each in past]
    fit = fit_detection(
        spec,
        [
            Stream(rows[each], parameters[each], counted, float(counted.sum()) / day)
            for each, counted in zip(past, validated, strict=True)
        ],
    )
    detection = detection.model_copy(update={"fit": fit})
    return spec.model_copy(update={"detection": detection}), fit


def openings(score: Floats, threshold: float) -> Events:
    """Events beyond a threshold with none of the last `HOLD_EVENTS` beyond it."""
    beyond = np.flatnonzero(score >= threshold)
    return beyond[np.diff(beyond, prepend=-HOLD_EVENTS - 1) > HOLD_EVENTS]


def counts_of(tested: Sequence[Tested], opened: Sequence[Events]) -> Floats:
    """By stream, the anomalies in which an alarm opens, and the openings outside [S, 2]."""
    counts = []
    for own, at in zip(tested, opened, strict=True):
        hits = sum(bool(((at >= a) & (at < b)).any()) for a, b in runs(own.labels))
        counts.append((hits, int((~own.labels[at]).sum())))
    return np.array(counts, np.float64)


def nab_score(tested: Sequence[Tested], opened: Sequence[Events]) -> float:
    """The score of NAB: 100 of a detection at the start of each window, 0 of none at all."""

    def weight(position: float) -> float:
        return -1.0 if position > 3 else float(2 / (1 + np.exp(5 * position)) - 1)

    total, windows = 0.0, 0
    for own, at in zip(tested, opened, strict=True):
        spans = runs(own.labels)
        windows += len(spans)
        for first, stop in spans:
            within = at[(at >= first) & (at < stop)]
            at_best = weight(-(stop - within[0]) / (stop - first)) if len(within) else None
            total += -1.0 if at_best is None else at_best / weight(-1.0)
        for event in at[~own.labels[at]].tolist():
            past = [(first, stop) for first, stop in spans if stop <= event]
            first, stop = past[-1] if past else (0, 0)
            total += 0.11 * (weight((event - stop + 1) / max(stop - first - 1, 1)) if past else -1)
    return 100 * (total + windows) / max(2 * windows, 1)


def row_of(name: str, tested: Sequence[Tested], score: Floats) -> str:
    """A line of the comparison with baselines."""
    parts, labels = [score[own.rows] for own in tested], [own.labels for own in tested]
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    spans, pooled = list(pairwise(ends)), np.concatenate(parts)
    days = [own.days for own in tested]
    scores = score_streams(np.zeros(len(pooled)), pooled, np.concatenate(labels), spans, days)
    vus = with_intervals(scores)
    low, high = vus["intervals"]["vus_pr"] or (np.nan, np.nan)
    best, nab = {rate: np.zeros((len(tested), 2)) for rate in RATES}, 0.0
    for threshold in np.unique(np.quantile(pooled, 1 - np.geomspace(3e-6, 0.3, THRESHOLDS))):
        opened = [openings(part, threshold) for part in parts]
        counts, nab = counts_of(tested, opened), max(nab, nab_score(tested, opened))
        for rate in RATES:
            is_allowed = counts[:, 1].sum() <= rate * sum(days)
            if is_allowed and counts[:, 0].sum() > best[rate][:, 0].sum():
                best[rate] = counts
    cells, draws = [f"{vus['vus_pr']:.2f} ({low:.2f} to {high:.2f})"], draw_streams(len(tested))
    anomalies = draws @ [float(each.anomalies) for each in scores]
    for rate in RATES:
        low, high = middle_95(100 * (draws @ best[rate][:, 0]) / np.maximum(anomalies, 1)) or (0, 0)
        cells.append(f"{best[rate][:, 0].sum():.0f} ({low:.0f} to {high:.0f}%)")
    return f"| {name} | {' | '.join(cells)} | {nab:.0f} |"


def rate_rows(
    alarm: AlarmSpec, tested: Sequence[Tested], fit: DetectionFit, nats: Floats
) -> Iterator[str]:
    """A line for each specified rate: alarms of the test parts at the model's own threshold, each
    stream followed from its first event."""
    days, anomalies = [own.days for own in tested], sum(len(runs(own.labels)) for own in tested)
    events_per_day = fit.events_per_day
    for rate in RATES:
        codes = []
        for own in tested:
            past, per_event = np.exp(-nats[own.start : own.rows.stop]), rate / events_per_day
            followed = follow_alarm(alarm, past, fit.threshold(rate), AlarmState(), per_event)
            codes.append(followed[own.rows.start - own.start :])
        opened = [np.flatnonzero(each == OPENED) for each in codes]
        counts, alarmed = counts_of(tested, opened), np.concatenate(codes) > 0
        ratios = counts[:, 1] / np.maximum(days, 1e-9) / rate
        cells = (
            f"{counts[:, 0].sum():.0f} of {anomalies}",
            f"{counts[:, 1].sum() / sum(days) / rate:.2f}",
            f"{np.median(ratios):.2f}, {np.max(ratios):.0f}",
            f"{100 * np.mean(ratios > 3):.0f}%, {100 * np.mean(counts[:, 1] > 1):.0f}%",
            f"{100 * alarmed.mean():.1f}%",
            f"{nab_score(tested, opened):.0f}",
        )
        yield f"| {rate:g} | {' | '.join(cells)} |"


def shares(tested: Sequence[Tested], nats: Floats) -> str:
    """A line of the shares of normal events below small probabilities."""
    cells = []
    for level in LEVELS:
        normal = [nats[own.rows][~own.labels] >= -np.log(level) for own in tested if own.days > 0]
        worst = max(float(part.mean()) for part in normal) / level
        cells.append(f"{np.concatenate(normal).mean() / level:.1f}, {worst:.0f}")
    return f"| {' | '.join(cells)} |"


def with_detection(spec: ModelSpec) -> ModelSpec:
    """The model with detection whose options are all open."""
    head = next(head.name for head in spec.heads if isinstance(head, AnomalyHead))
    return spec.model_copy(update={"detection": DetectionSpec(head=head)})


def main(model: Path, labelled: Path, day: float) -> None:
    """Print the tables in Markdown, line by line."""
    artifact = load_artifact(model)
    spec = with_detection(artifact.spec)
    streams = streams_of(spec, pl.read_csv(labelled, schema_overrides={"time": pl.String}))
    outputs = run_network(spec, artifact.weights, streams)
    tested = tested_of(spec, streams, day)
    train, validate = (np.zeros(streams.events, np.bool_) for _ in range(2))
    trained = []
    for own, (start, _) in zip(tested, streams.spans, strict=True):
        first = own.rows.start - round((own.rows.start - start) * VALIDATED)
        train[start:first] = validate[first : own.rows.start] = True
        trained.append((start, first))
    spec, season = resolve_season(spec, streams.windows(trained), sys.maxsize)
    spec = resolve_detection(spec)
    detection, head, _ = detection_of(spec)
    print(season)
    parts = Parts(train, validate, float(validate.sum()) / day)
    spec, fit = fitted(spec, streams, outputs, parts, day)
    scored = output_spec(spec).by_name(detect(spec, streams, outputs))
    probability = scored[f"{head.name}.probability"].astype(np.float64)
    nats = -np.log(np.maximum(probability, 1e-30))
    print(*rate_rows(detection.alarm, tested, fit, nats), shares(tested, nats), sep="\n")
    print(row_of(DETECTION, tested, nats), flush=True)
    seasonal = detection.model_copy(update={"season_events": round(day)})
    spec = spec.model_copy(update={"detection": seasonal})
    nats_of_head = network_outputs(spec).by_name(outputs)[head.name]
    for name, each in detection_baselines(spec, streams, nats_of_head, parts):
        score = each.score
        if not name.startswith(RAW_NATS):
            score = np.concatenate([own_past_nats(score[a:b]) for a, b in streams.spans])
        print(row_of(name, tested, score), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
