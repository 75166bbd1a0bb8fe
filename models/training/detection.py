"""Fits `detection` to the validation set, on which the network was not trained.

The labels of anomalies are not used.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models.detection.fit import Stream, check_size, fit_detection
from models.spec.layout import anomaly_size, detection_of, network_outputs
from models.spec.model import ModelSpec, schema_of
from models.training.data import Streams
from models.training.evaluate import MS_PER_DAY, run_network


def fitted_detection(
    spec: ModelSpec,
    weights: Mapping[str, NDArray[np.float32]],
    streams: Streams,
    from_key: int,
    to_key: int,
) -> ModelSpec:
    """Fit the detection of a spec to the events with keys of the split in [from_key, to_key).

    Args:
        spec: a trained model, with or without detection.
        weights: its weights.
        streams: the data it was trained on.

    Raises:
        DataError: there are too few events.
    """
    if spec.detection is None:
        return spec
    return fitted_to_outputs(spec, streams, run_network(spec, weights, streams), from_key, to_key)


def fitted_to_outputs(
    spec: ModelSpec, streams: Streams, outputs: NDArray[np.float32], from_key: int, to_key: int
) -> ModelSpec:
    """Fit the detection of a spec, given the network's outputs from each stream's start."""
    detection, head, _ = detection_of(spec)
    first = network_outputs(spec).slices[head.name].stop
    parameters = outputs[:, first : first + anomaly_size(spec, head)]
    rows = streams.encoded(schema_of(spec))
    parts = [slice(start, stop) for start, stop in streams.sessions]
    counted, days = counted_events(streams, from_key, to_key)
    followed = [
        Stream(rows[part], parameters[part], events, duration)
        for part, events, duration in zip(parts, counted, days, strict=True)
    ]
    fit = fit_detection(spec, followed)
    return spec.model_copy(update={"detection": detection.model_copy(update={"fit": fit})})


def check_detection(spec: ModelSpec, streams: Streams, from_key: int, to_key: int) -> None:
    """Reject a table with too few events in [from_key, to_key) to fit the spec's detection to.

    Raises:
        DataError: there are too few.
    """
    if spec.detection is not None:
        check_size(*counted_events(streams, from_key, to_key))


def counted_events(
    streams: Streams, from_key: int, to_key: int
) -> tuple[list[NDArray[np.bool_]], list[float]]:
    """Which events of each session are in [from_key, to_key), and the days from its first to its
    last one."""
    moments, keys = streams.moments_ms, streams.split_keys
    counted = (keys >= from_key) & (keys < to_key)
    days = []
    for start, stop in streams.sessions:
        within = moments[start:stop][counted[start:stop]]
        days.append(float(np.ptp(within)) / MS_PER_DAY if len(within) else 0.0)
    return [counted[start:stop] for start, stop in streams.sessions], days
