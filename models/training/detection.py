"""Fits `detection` to the validation set, which the network was not trained on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models.detection.fit import Stream, fit_detection
from models.spec.layout import anomaly_size, detection_of, network_outputs
from models.spec.model import ModelSpec
from models.training.data import Streams, schema_of
from models.training.evaluate import MS_PER_DAY, run_network


def fitted_detection(
    spec: ModelSpec,
    weights: Mapping[str, NDArray[np.float32]],
    streams: Streams,
    from_ms: int,
    to_ms: int,
) -> ModelSpec:
    """Fit the detection of a spec to the events in [from_ms, to_ms).

    Args:
        spec: a trained model, with or without detection.
        weights: its weights.
        streams: the data it was trained on.

    Raises:
        DataError: there are too few events.
    """
    if spec.detection is None:
        return spec
    return fitted_to_outputs(spec, streams, run_network(spec, weights, streams), from_ms, to_ms)


def fitted_to_outputs(
    spec: ModelSpec, streams: Streams, outputs: NDArray[np.float32], from_ms: int, to_ms: int
) -> ModelSpec:
    """As `fitted_detection`, given the network's outputs from each stream's beginning."""
    detection, head, _ = detection_of(spec)
    first = network_outputs(spec).slices[head.name].stop
    parameters = outputs[:, first : first + anomaly_size(spec, head)]
    rows = streams.encoded(schema_of(spec))
    moments = streams.moments_ms
    counted = (moments >= from_ms) & (moments < to_ms)
    followed = []
    for start, stop in streams.sessions:
        within = moments[start:stop][counted[start:stop]]
        days = float(np.ptp(within)) / MS_PER_DAY if len(within) else 0.0
        part = slice(start, stop)
        followed.append(Stream(rows[part], parameters[part], counted[part], days))
    fit = fit_detection(spec, followed)
    return spec.model_copy(update={"detection": detection.model_copy(update={"fit": fit})})
