"""Compares methods of anomaly detection, with thresholds for the same number of false alarms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.detection.alarms import AlarmState, follow_alarm
from models.detection.fit import alarm_threshold
from models.detection.scoring import average_precision, score_alarms
from models.spec.layout import detection_of, network_outputs, output_spec
from models.spec.model import ModelSpec
from models.training.data import Streams, moment_ms, schema_of, streams_of, training_of
from models.training.detection import fitted_to_outputs
from models.training.evaluate import MS_PER_DAY, anomalous_events, detect, run_network

Floats = NDArray[np.float64]

LABEL = "anomaly"
DRAWS = 1000
METHODS: dict[str, dict[str, Any]] = {
    "detection": {},
    "detection without the season": {"season_events": None},
    "forecast alone": {"channels": ("forecast",), "season_events": None},
    "level alone, without the network": {"channels": ("level",), "season_events": None},
    "change alone, without the network": {"channels": ("change",), "season_events": None},
}
"""Options of the detection that replace those of the model."""
HEADER = """\
| anomalies | method | average precision of a sensor | recall | false alarms a day | delay |
| --- | --- | --- | --- | --- | --- |
"""


class _Table(NamedTuple):
    """Streams of equal length, the network's outputs for them, and their labels."""

    streams: Streams
    outputs: NDArray[np.float32]
    anomalous: NDArray[np.bool_]

    def rows(self, values: NDArray[Any], from_ms: int, to_ms: int | None = None) -> NDArray[Any]:
        """The values of the events in [from_ms, to_ms): [streams, events]."""
        moments = self.streams.moments_ms
        kept = (moments >= from_ms) & (moments < (to_ms or np.inf))
        return values[kept].reshape(len(self.streams.spans), -1)


class _Scored(NamedTuple):
    """The score of each event by one method, larger for what is more unusual, and the alarm."""

    score: Floats
    alarm: NDArray[Any]


def comparison(artifact: Artifact, tables: Mapping[str, pl.DataFrame]) -> str:
    """The table in Markdown.

    Args:
        artifact: the example's model.
        tables: by name; each method is fitted to the first.
    """
    spec = artifact.spec
    read = {}
    for name, frame in tables.items():
        streams = streams_of(spec, frame)
        outputs = run_network(spec, artifact.weights, streams)
        read[name] = _Table(streams, outputs, anomalous_events(spec, streams, LABEL))
    fitted_to = next(iter(read.values()))
    lines = [
        f"| {name} | {method} | {_scores(spec, table, scored)} |\n"
        for name, table in read.items()
        for method, scored in _methods(spec, fitted_to, table)
    ]
    return HEADER + "".join(lines)


def _methods(spec: ModelSpec, fitted_to: _Table, table: _Table) -> Iterator[tuple[str, _Scored]]:
    yield "nats of the network", _by_nats(spec, fitted_to, table)
    detection, head, _ = detection_of(spec)
    for method, options in METHODS.items():
        own = detection.model_copy(update={"fit": None, **options})
        changed = fitted_to_outputs(
            spec.model_copy(update={"detection": own}),
            fitted_to.streams,
            fitted_to.outputs,
            *_split(spec),
        )
        found = output_spec(changed).by_name(detect(changed, table.streams, table.outputs))
        probability = found[f"{head.name}.probability"].astype(np.float64)
        yield method, _Scored(-probability, found[f"{head.name}.alarm"])


def _by_nats(spec: ModelSpec, fitted_to: _Table, table: _Table) -> _Scored:
    """The same alarms on the nats alone: their share among those of the validation set is the
    probability."""
    detection, head, _ = detection_of(spec)
    at = network_outputs(spec).slices[head.name].start
    validated = fitted_to.rows(fitted_to.outputs[:, at], *_split(spec))
    usual = np.sort(validated.ravel())

    def probability(nats: NDArray[Any]) -> Floats:
        return np.asarray(1 - np.searchsorted(usual, nats, side="left") / (len(usual) + 1))

    days = validated.size / len(fitted_to.streams.moments_ms) * _days(fitted_to)
    threshold = alarm_threshold(
        detection.alarm,
        list(probability(validated)),
        detection.alarm.false_alarms_per_day * days,
    )
    found = probability(table.outputs[:, at])
    alarms = [
        follow_alarm(detection.alarm, found[start:stop], threshold, AlarmState(np.zeros(3)))
        for start, stop in table.streams.spans
    ]
    return _Scored(table.outputs[:, at].astype(np.float64), np.concatenate(alarms))


def _scores(spec: ModelSpec, table: _Table, scored: _Scored) -> str:
    """The cells of a row, on the held-out events."""
    _, test_ms = _split(spec)
    score, alarm, anomalous = (table.rows(values, test_ms) for values in (*scored, table.anomalous))
    each = np.array([average_precision(*pair) for pair in zip(score, anomalous, strict=True)])
    random = np.random.default_rng(0)
    means = each[random.integers(len(each), size=(DRAWS, len(each)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    steps = score.shape[1]
    spans = [(start, start + steps) for start in range(0, score.size, steps)]
    days = score.size / len(table.streams.moments_ms) * _days(table) / len(spans)
    scores = score_alarms(
        alarm.ravel(), score.ravel(), anomalous.ravel(), spans, [days] * len(spans)
    )
    return (
        f"{each.mean():.2f} ({low:.2f} to {high:.2f}) | {scores.recall:.2f} | "
        f"{scores.false_per_day:.3f} | {scores.delay_events:.0f}"
    )


def _days(table: _Table) -> float:
    """Days of all streams together."""
    moments = table.streams.moments_ms
    return sum(float(np.ptp(moments[a:b])) for a, b in table.streams.spans) / MS_PER_DAY


def _split(spec: ModelSpec) -> tuple[int, int]:
    """The first moments of the validation set and of the test set."""
    training, schema = training_of(spec), schema_of(spec)
    return (
        moment_ms(schema, training.validate_from, "validate_from"),
        moment_ms(schema, training.test_from, "test_from"),
    )
