"""The forecast of each event by an anomaly head, compared with the event.

Under the forecast a numeric target is normal in its encoded value, with mean mu and deviation
sigma; a boolean one is true with probability p, so that its mean is p and its deviation
sqrt(p (1 - p)); a categorical one has a probability per category. Pure NumPy in float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import SpecError
from models.events.schema import BooleanField, CategoricalField, EventField, NumericField
from models.events.values import unstandardise
from models.spec.detection import OutputName, ordered_targets
from models.spec.heads import DEVIATION_LIMIT, LOG_DEVIATION_LIMIT
from models.spec.layout import anomaly_width, detection_of
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


class _Target(NamedTuple):
    """One target: its place among the targets, and its parameters among those of the forecast."""

    place: int
    field: EventField
    parameters: slice


class Forecasts:
    """The forecasts of one model with `detection`."""

    def __init__(self, spec: ModelSpec):
        _, head, events = detection_of(spec)
        self._targets, start = [], 0
        for index, name in enumerate(head.targets):
            field = events.field(name)
            width = anomaly_width(field)
            self._targets.append(_Target(index, field, slice(start, start + width)))
            start += width
        names = ordered_targets(head.targets, events)
        self._ordered = [each for each in self._targets if each.field.name in names]
        self._is_numeric = all(isinstance(each.field, NumericField) for each in self._targets)

    def mean(self, target: int, parameters: Floats) -> Floats:
        """The encoded mean [B, T] of a numeric target, by its place, of parameters [P, B, T]."""
        return np.asarray(parameters[self._targets[target].parameters.start])

    def deviations(self, values: Floats, parameters: Floats) -> Floats:
        """How far each event is from its forecast, in predicted deviations; of categorical and
        boolean targets the square root of twice the nats.

        Args:
            values: [D, B, T], encoded.
            parameters: [P, B, T].

        Returns:
            [D, B, T].
        """
        if self._is_numeric:
            deviations = values - parameters[::2]
            deviations *= _inverse_deviation(parameters[1::2])
            return np.asarray(deviations)
        deviations = np.empty_like(values)
        for index, field, part in self._targets:
            value, own = values[index], parameters[part]
            if isinstance(field, NumericField):
                deviations[index] = (value - own[0]) * _inverse_deviation(own[1])
            else:
                deviations[index] = np.sqrt(2.0 * np.maximum(_code_nats(field, value, own), 0.0))
        return deviations

    def nats(self, values: Floats, present: NDArray[np.bool_], parameters: Floats) -> Floats:
        """-log p of each target [D, B, T], 0 where the event has none."""
        nats = np.zeros_like(values)
        for index, field, part in self._targets:
            np.copyto(
                nats[index],
                _nats(field, values[index], parameters[part]),
                where=present[index],
            )
        return nats

    def describe(
        self,
        names: Collection[OutputName],
        values: Floats,
        present: NDArray[np.bool_],
        parameters: Floats,
    ) -> dict[OutputName, Floats]:
        """Outputs by name, of `DESCRIBED`.

        mean      [D', B, T], mu in the field's unit (its median, if the field has a transform; as
                  encoded, if the field has `normalisation`), or p
        spread    [D', B, T], sigma in the field's unit: half the distance between the values one
                  sigma above and below mu
        residual  [D', B, T], the value minus the mean
        z         [D', B, T], (value - mu) / sigma, before the unit
        pit       [D', B, T], the probability of a smaller value, and half that of an equal one
        nats      [D, B, T], -log p(value)

        D' are the targets that are not categorical. An event without a target has its mean and
        spread, and residual 0, z 0, pit 0.5 and nats 0.

        Args:
            names: those to compute.
            present: bool [D, B, T], whether the event has the targets.
        """
        if not names:
            return {}
        described: dict[OutputName, list[Floats]] = {name: [] for name in names}
        for index, field, part in self._ordered:
            is_present, value = present[index], values[index]
            columns = _describe(names, field, value, is_present, parameters[part])
            for name, column in columns.items():
                described[name].append(column)
        if "nats" in described:
            described["nats"] = list(self.nats(values, present, parameters))
        # as float32, none may become infinite
        return {
            name: np.clip(np.stack(columns), -LARGEST_OUTPUT, LARGEST_OUTPUT)
            for name, columns in described.items()
        }


def _describe(
    names: Collection[OutputName],
    field: EventField,
    value: Floats,
    is_present: NDArray[np.bool_],
    parameters: Floats,
) -> dict[OutputName, Floats]:
    """The columns [B, T] of one target with an order, except its nats."""
    columns: dict[OutputName, Floats] = {}
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
    if isinstance(field, NumericField):
        inverse = _inverse_deviation(parameters[1])
        z = _clip((value - parameters[0]) * inverse)
        return np.asarray(_HALF_LOG_TAU - np.log(inverse) + 0.5 * np.square(z))
    return _code_nats(field, value, parameters)


def _code_nats(field: EventField, value: Floats, parameters: Floats) -> Floats:
    """-log p of the codes [B, T] of a categorical or boolean target."""
    match field:
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


def steps_last(columns: NDArray[Any]) -> Floats:
    """[B, T, K] as float64 [K, B, T]."""
    return columns.transpose(2, 0, 1).astype(np.float64, order="C")
