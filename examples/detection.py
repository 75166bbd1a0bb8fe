"""Compares detection with its parts and its baselines, on tables of labelled anomalies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.detection.scoring import StreamScores, vus_difference, with_intervals
from models.spec.layout import detection_of, network_outputs, output_spec
from models.spec.model import ModelSpec
from models.training.alarm_report import parts_of, scored_by, scores_from
from models.training.data import Streams, split_of, streams_of
from models.training.detection import fitted_to_outputs
from models.training.detection_baselines import Scored, detection_baselines
from models.training.evaluate import anomalous_events, detect, run_network

LABEL = "anomaly"
PARTS: dict[str, dict[str, object]] = {
    "detection": {},
    "detection without the season": {"season_events": None},
}
"""Options of the detection that replace those of the model."""
HEADER = """\
| anomalies | method | VUS-PR | minus detection | recall | an alarm opens | false alarms a day | \
time in alarm | delay |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


class _Table(NamedTuple):
    """Streams, the network's outputs for them, and their labels."""

    streams: Streams
    outputs: NDArray[np.float32]
    anomalous: NDArray[np.bool_]


def comparison(artifact: Artifact, tables: Mapping[str, pl.DataFrame]) -> str:
    """The comparison in Markdown, with intervals over streams.

    Args:
        artifact: the model.
        tables: by name; detection is fitted to the validation set of the first, and the baselines
            to each table's own training and validation sets.
    """
    spec = artifact.spec
    read = {}
    for name, frame in tables.items():
        streams = streams_of(spec, frame)
        outputs = run_network(spec, artifact.weights, streams)
        read[name] = _Table(streams, outputs, anomalous_events(spec, streams, LABEL))
    fitted_to = next(iter(read.values()))
    test_key = split_of(spec).test
    text = HEADER
    for name, table in read.items():
        is_scored = table.streams.split_keys >= test_key
        scores = {
            method: scores_from(table.streams, found, table.anomalous, is_scored)
            for method, found in _methods(spec, fitted_to, table)
        }
        for method, each in scores.items():
            text += f"| {name} | {method} | {_cells(each, scores['detection'])} |\n"
    return text


def _methods(spec: ModelSpec, fitted_to: _Table, table: _Table) -> Iterator[tuple[str, Scored]]:
    detection, head, _ = detection_of(spec)
    split = split_of(spec)
    validated = split.validate, split.test
    for method, options in PARTS.items():
        own = detection.model_copy(update={"fit": None, **options})
        changed = fitted_to_outputs(
            spec.model_copy(update={"detection": own}),
            fitted_to.streams,
            fitted_to.outputs,
            *validated,
        )
        found = output_spec(changed).by_name(detect(changed, table.streams, table.outputs))
        yield method, scored_by(head.name, found)
    nats = table.outputs[:, network_outputs(spec).slices[head.name].start]
    yield from detection_baselines(spec, table.streams, nats, parts_of(table.streams, split))


def _cells(streams: Sequence[StreamScores], detection: Sequence[StreamScores]) -> str:
    scores = with_intervals(streams)

    def cell(name: str, digits: int) -> str:
        low, high = scores["intervals"][name]
        return f"{scores[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    difference = ""
    if streams is not detection:
        compared = vus_difference(streams, detection)
        low, high = compared["interval"]
        difference = f"{compared['value']:+.2f} ({low:+.2f} to {high:+.2f})"
    delay = "" if scores["delay_events"] is None else f"{scores['delay_events']:.0f}"
    return (
        f"{cell('vus_pr', 2)} | {difference} | {cell('recall', 2)} | {cell('opening_recall', 2)} | "
        f"{cell('false_per_day', 3)} | {scores['time_in_alarm']:.3f} | {delay}"
    )
