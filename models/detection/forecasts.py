"""The forecast of each event by an anomaly head, compared with the event.

Under the forecast a numeric target is normal in its encoded value, with mean mu and deviation
sigma; a boolean one is true with probability p, so that its mean is p and its deviation
sqrt(p (1 - p)); a categorical one has a probability per category. Pure NumPy in float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.detection.targets import targets_of
from models.errors import SpecError
from models.events.schema import BooleanField, CategoricalField, EventField, NumericField
from models.events.values import unstandardise
from models.spec.detection import OutputName
from models.spec.heads import DEVIATION_LIMIT, LOG_DEVIATION_LIMIT
from models.spec.model import ModelSpec

Floats = NDArray[np.float64]

DESCRIBED: Final = frozenset[OutputName]({"mean", "spread", "residual", "z", "pit", "nats"})
"""The outputs of `Forecasts.describe`."""
_HALF_LOG_TAU: Final = 0.5 * math.log(2 * math.pi)
_SMALLEST_DEVIATION: Final = 1e-6
"""Of a boolean target, where its probability is 0 or 1 in float64."""
LARGEST_OUTPUT: Final = float(np.finfo(np.float32).max)
"""Largest size of an output, so that it is finite as float32."""
_erfc = np.frompyfunc(math.erfc, 1, 1)


class Forecasts:
    """The forecasts of one model with `detection`."""

    def __init__(self, spec: ModelSpec):
        self._targets = targets_of(spec)

    def describe(
        self,
        names: Collection[OutputName],
        rows: NDArray[np.float32],
        lengths: NDArray[Any],
        parameters: NDArray[np.float32],
    ) -> dict[OutputName, Floats]:
        """Outputs by name, of `DESCRIBED`.

        mean      [B, T, D'], mu in the field's unit (its median, if the field has a transform; as
                  encoded, if the field has `normalisation`), or p
        spread    [B, T, D'], sigma in the field's unit: half the distance between the values one
                  sigma above and below mu
        residual  [B, T, D'], the value minus the mean
        z         [B, T, D'], (value - mu) / sigma, before the unit
        pit       [B, T, D'], the probability of a smaller value, and half that of an equal one
        nats      [B, T, D], -log p(value)

        D' are the targets that are not categorical. An event without a target has its mean and
        spread, and residual 0, z 0, pit 0.5 and nats 0.

        Args:
            names: those to compute.
            rows: [B, T, F], encoded.
            lengths: int [B], 0..T; outputs beyond them mean nothing.
            parameters: [B, T, P].
        """
        if not names:
            return {}
        beyond = np.arange(rows.shape[1]) >= lengths[:, np.newaxis]
        described: dict[OutputName, list[Floats]] = {name: [] for name in names}
        for target in self._targets:
            is_present = ~beyond
            if target.missing is not None:
                is_present &= rows[..., target.missing] == 0
            value = np.where(is_present, rows[..., target.encoded], 0.0).astype(np.float64)
            own = np.where(beyond[..., np.newaxis], 0.0, parameters[..., target.parameters])
            # [width, B, T]
            own = np.moveaxis(own.astype(np.float64), -1, 0)
            columns = _describe(names, target.field, value, is_present, own)
            for name, found in columns.items():
                described[name].append(found)
        # as float32, none may become infinite
        return {
            name: np.clip(np.stack(columns, axis=-1), -LARGEST_OUTPUT, LARGEST_OUTPUT)
            for name, columns in described.items()
        }


def _describe(
    names: Collection[OutputName],
    field: EventField,
    value: Floats,
    is_present: NDArray[np.bool_],
    parameters: Floats,
) -> dict[OutputName, Floats]:
    """The columns [B, T] of one target."""
    columns: dict[OutputName, Floats] = {}
    if "nats" in names:
        columns["nats"] = np.where(is_present, _nats(field, value, parameters), 0.0)
    if isinstance(field, CategoricalField):
        return columns
    z: Floats
    if isinstance(field, NumericField):
        mu, inverse = parameters[0], _inverse_deviation(parameters[1])
        sigma, z = 1.0 / inverse, _clip((value - mu) * inverse)
        mean = in_field_units(field, mu)
        if "spread" in names:
            columns["spread"] = (
                in_field_units(field, mu + sigma) - in_field_units(field, mu - sigma)
            ) / 2
        if "residual" in names:
            columns["residual"] = np.where(is_present, in_field_units(field, value) - mean, 0.0)
        if "pit" in names:
            columns["pit"] = 0.5 * np.asarray(_erfc(-z / math.sqrt(2)), np.float64)
    else:
        mean = 0.5 * (1.0 + np.tanh(0.5 * parameters[0]))
        deviation = np.sqrt(mean * (1.0 - mean))
        z = (value - mean) / np.maximum(deviation, _SMALLEST_DEVIATION)
        columns["spread"], columns["residual"] = deviation, np.where(is_present, value - mean, 0.0)
        columns["pit"] = np.where(value > 0, 1.0 - mean / 2, (1.0 - mean) / 2)
    if "pit" in columns:
        columns["pit"] = np.where(is_present, columns["pit"], 0.5)
    columns["mean"], columns["z"] = np.asarray(mean), np.where(is_present, z, 0.0)
    return {name: column for name, column in columns.items() if name in names}


def in_field_units(field: NumericField, values: Floats) -> Floats:
    """Encoded values in the field's unit; with `normalisation` they stay in the stream's own
    deviations, which vary from event to event."""
    return values if field.normalisation is not None else unstandardise(field, values)


def _inverse_deviation(log_deviation: Floats) -> Floats:
    limited = np.maximum(np.minimum(log_deviation, LOG_DEVIATION_LIMIT), -LOG_DEVIATION_LIMIT)
    return np.asarray(np.exp(-limited))


def _clip(z: Floats) -> Floats:
    """As the head bounds it, so that its square is finite."""
    return np.asarray(np.clip(z, -DEVIATION_LIMIT, DEVIATION_LIMIT))


def _nats(field: EventField, value: Floats, parameters: Floats) -> Floats:
    """-log p of the values [B, T] of one target."""
    match field:
        case NumericField():
            inverse = _inverse_deviation(parameters[1])
            z = _clip((value - parameters[0]) * inverse)
            return np.asarray(_HALF_LOG_TAU - np.log(inverse) + 0.5 * np.square(z))
        case CategoricalField():
            code = np.rint(value).astype(np.int64)[np.newaxis]
            chosen = np.take_along_axis(parameters, code, axis=0)
            largest = parameters.max(axis=0, keepdims=True)
            total = np.log(np.exp(parameters - largest).sum(axis=0)) + (largest - chosen)[0]
            return np.asarray(total)
        case BooleanField():
            logit = parameters[0]
            return np.asarray(np.logaddexp(0.0, logit) - value * logit)
        case _:
            raise SpecError(f"field {field.name!r}: {field.kind} cannot be a target")
