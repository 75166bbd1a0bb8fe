"""Forecast decoding around a decoder's step: initial state, inputs, feedback, sample paths.

    previous_0 = the last observed values, state_0 = the encoder's
    parameters_k, state_k = step(previous_(k-1), known_k, state_(k-1))        k = 1..H
    previous_k = the median (for a Gaussian its mean, the same), or a value drawn

A forecast has one such path along the medians, the quantiles of every step given the path before
it, and any number of sample paths. Sample paths depend on the seed only: equal seeds, states and
covariates give equal paths, and a shorter horizon gives their prefixes.

    quantiles   q_1..q_Q at levels p_1..p_Q, drawn by inverting the distribution that is linear
                between them and falls off exponentially beyond, without a jump in density:
                  u < p_1:  q_1 + m p_1 log(u / p_1),            m = (q_2 - q_1) / (p_2 - p_1)
                  u > p_Q:  q_Q - m (1 - p_Q) log((1 - u) / (1 - p_Q)),  m from the last two
    gaussian    mu + sigma z, sigma = exp(clip(s, -7, 7))

Values are standardised inside and in their fields' own units outside. Pure NumPy in float64:
the step itself is computed by a runtime, which the caller of `Decoding` runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import DataError, SpecError
from models.events.columns import EventColumns
from models.events.encode import Clock, encode
from models.events.schema import EventSchema, NumericField
from models.events.values import unstandardise
from models.spec.decoder import (
    LAST,
    MEDIAN,
    DecoderSpec,
    QuantilesHead,
    known_columns,
    known_schema,
)
from models.spec.heads import LOG_DEVIATION_LIMIT
from models.spec.layout import state_spec
from models.spec.model import ModelSpec

Floats = NDArray[np.float64]
FloatRows = NDArray[np.float32]

_SMALLEST = 2.0**-53
"""Uniform draws keep this far from 0 and 1, whose logarithms are infinite."""


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """The forecast of H steps of D targets, in the fields' units, float32.

    Attributes:
        point: [H, D].
        quantiles: [H, D, Q].
        paths: [S, H, D], drawn; S may be 0.
    """

    point: FloatRows
    quantiles: FloatRows
    paths: FloatRows


class FutureCovariates(NamedTuple):
    """The known future covariates of a forecast.

    Attributes:
        rows: float32 [H, K], encoded.
        times_ms: epoch milliseconds of each step; None without a timestamp.
    """

    rows: FloatRows
    times_ms: tuple[int, ...] | None


def decoder_of(spec: ModelSpec) -> tuple[DecoderSpec, ModelSpec, EventSchema]:
    """The decoder of a model, its step network and the events; SpecError if it has none."""
    if spec.decoder is None or spec.decoder_network is None or spec.events is None:
        raise SpecError(f"model {spec.name!r}: expected a `decoder`")
    return spec.decoder, spec.decoder_network, spec.events


def start_parts(spec: ModelSpec) -> list[slice | int]:
    """The sources of the parts of the decoder's packed state [M], in their order.

    Returns:
        The columns of the encoder's packed state [N], or how many zeros there are.
    """
    decoder, network, _ = decoder_of(spec)
    encoder = state_spec(spec).slices
    sources: list[slice | int] = []
    for part in state_spec(network).parts:
        layer, _, kind = part.name.rpartition(".")
        source = decoder.starts_from.get(layer)
        sources.append(part.size if source is None else encoder[f"{source}.{kind}"])
    return sources


def start(spec: ModelSpec, floats: FloatRows) -> tuple[FloatRows, FloatRows]:
    """The decoder's state [..., M] and first previous values [..., D] from floats [..., N]."""
    pieces = [
        np.zeros((*floats.shape[:-1], part), np.float32)
        if isinstance(part, int)
        else floats[..., part]
        for part in start_parts(spec)
    ]
    return np.concatenate(pieces, axis=-1), floats[..., state_spec(spec).slices[LAST]]


def encode_covariates(
    spec: ModelSpec, clock: Clock, horizon: int, future: EventColumns | None
) -> FutureCovariates:
    """Encode the known future covariates of the H steps after a stream's last event.

    Args:
        spec: a fitted model with a decoder.
        clock: the clock of the stream.
        horizon: H.
        future: H events under `known_schema(..., timed=False)`, or None.

    Raises:
        DataError: a covariate is missing, or a timestamp is not that of its step; names step and
            field.
    """
    decoder, _, events = decoder_of(spec)
    schema = known_schema(events, decoder, timed=True)
    if schema is None:
        return FutureCovariates(np.zeros((horizon, 0), np.float32), None)
    if future is None:
        for name in decoder.known:
            raise DataError(index=0, field=name, expected="what is known of the step", got="none")
        future = EventColumns(horizon, {}, {})
    present, values = dict(future.present), dict(future.values)
    times_ms = None
    if events.timestamp is not None:
        name = events.timestamp.name
        times_ms = _times_ms(name, decoder, clock, horizon, future)
        present[name], values[name] = np.ones(horizon, np.bool_), times_ms
    rows, _ = encode(schema, EventColumns(horizon, present, values), Clock())
    columns = [schema.column_index[name] for name in known_columns(spec, decoder)]
    times = None if times_ms is None else tuple(times_ms.tolist())
    return FutureCovariates(rows[:, columns], times)


def _times_ms(
    name: str, decoder: DecoderSpec, clock: Clock, horizon: int, future: EventColumns
) -> NDArray[np.int64]:
    """Epoch milliseconds of the forecast steps: derived, given, or both, which must be equal."""
    times_ms = future.values.get(name, np.zeros(horizon, np.int64))
    there = future.present.get(name, np.zeros(horizon, np.bool_))
    if decoder.step_ms is None or clock.seen == 0:
        if not there.all():
            why = "no event had one" if decoder.step_ms is not None else "steps are not regular"
            raise DataError(
                index=int(np.argmin(there)),
                field=name,
                expected=f"the timestamp of the step, since {why}",
                got="none",
            )
        return np.asarray(times_ms, np.int64)
    derived = clock.last_ms + decoder.step_ms * np.arange(1, horizon + 1, dtype=np.int64)
    differs = there & (times_ms != derived)
    if differs.any():
        at = int(np.argmax(differs))
        raise DataError(
            index=at,
            field=name,
            expected=f"{int(derived[at])}, {decoder.step_s} s after the one before",
            got=str(int(times_ms[at])),
        )
    return derived


class Distribution:
    """The predictive distribution with parameters [..., P]; values [..., D] are standardised."""

    def __init__(self, spec: ModelSpec):
        self._decoder, _, self._events = decoder_of(spec)
        self._count = len(self._decoder.targets)
        self.levels = np.array(self._decoder.head.quantiles, np.float64)
        self._median = self._decoder.head.quantiles.index(MEDIAN)
        self._normal = np.array([NormalDist().inv_cdf(p) for p in self.levels.tolist()])

    def quantiles(self, parameters: FloatRows) -> Floats:
        """Quantiles [..., D, Q], rising."""
        values = self._by_target(parameters)
        if isinstance(self._decoder.head, QuantilesHead):
            return values
        mean, deviation = _gaussian(values)
        return np.asarray(mean[..., np.newaxis] + deviation[..., np.newaxis] * self._normal)

    def point(self, quantiles: Floats) -> Floats:
        """The medians [..., D] among the quantiles [..., D, Q]."""
        return np.asarray(quantiles[..., self._median])

    def noise(self, seed: int, horizon: int, samples: int) -> Floats:
        """The random numbers of the sample paths, [H, S, D]."""
        random = np.random.Generator(np.random.PCG64(seed))
        shape = (horizon, samples, self._count)
        if isinstance(self._decoder.head, QuantilesHead):
            return np.asarray(np.clip(random.random(shape), _SMALLEST, 1 - _SMALLEST))
        return np.asarray(random.standard_normal(shape))

    def sample(self, parameters: FloatRows, noise: Floats) -> Floats:
        """Sample values [S, D] from parameters [S, P] and noise [S, D]."""
        if isinstance(self._decoder.head, QuantilesHead):
            return _invert(self.levels, self.quantiles(parameters), noise)
        mean, deviation = _gaussian(self._by_target(parameters))
        return np.asarray(mean + deviation * noise)

    def _by_target(self, parameters: FloatRows) -> Floats:
        """[..., P] -> [..., D, P / D]."""
        width = parameters.shape[-1] // self._count
        exact = np.asarray(parameters, np.float64)
        return np.asarray(exact.reshape(*parameters.shape[:-1], self._count, width))

    def in_units(self, values: Floats, axis: int = -1) -> FloatRows:
        """Undo standardisation and transform; `axis` is that of the targets."""
        columns = np.moveaxis(values, axis, 0).copy()
        for at, name in enumerate(self._decoder.targets):
            field = self._events.field(name)
            if not isinstance(field, NumericField):
                raise SpecError(f"decoder: expected a numeric field {name!r}")
            columns[at] = unstandardise(field, columns[at])
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(np.moveaxis(columns, 0, axis), np.float32)


def _gaussian(values: Floats) -> tuple[Floats, Floats]:
    """Mean and deviation [..., D] of [..., D, 2]."""
    bounded = np.clip(values[..., 1], -LOG_DEVIATION_LIMIT, LOG_DEVIATION_LIMIT)
    return values[..., 0], np.exp(bounded)


def _invert(levels: Floats, quantiles: Floats, uniform: Floats) -> Floats:
    """The distribution's inverse at `uniform` [..., D]; see the module."""
    slopes = np.diff(quantiles, axis=-1) / np.diff(levels)
    at = np.clip(np.searchsorted(levels, uniform), 1, len(levels) - 1)[..., np.newaxis]
    low = np.take_along_axis(quantiles, at - 1, -1)[..., 0]
    slope = np.take_along_axis(slopes, at - 1, -1)[..., 0]
    inside = low + slope * (uniform - levels[at[..., 0] - 1])
    first, last = levels[0], levels[-1]
    below = quantiles[..., 0] + slopes[..., 0] * first * np.log(np.minimum(uniform / first, 1.0))
    falling = np.log(np.minimum((1 - uniform) / (1 - last), 1.0))
    above = quantiles[..., -1] - slopes[..., -1] * (1 - last) * falling
    return np.where(uniform < first, below, np.where(uniform > last, above, inside))


class Decoding:
    """The decoding of one forecast: H times, run a step on `rows` and `states`, then `advance`.

    Row 0 is the path along the medians, rows 1..S are sample paths.

    Args:
        spec: a fitted model with a decoder.
        floats: float32 [N], the stream's state.
        known: float32 [H, K], H >= 1.
        samples: S >= 0.
        seed: seed of the sample paths.
    """

    def __init__(
        self, spec: ModelSpec, floats: FloatRows, known: FloatRows, samples: int, seed: int
    ):
        self._distribution = Distribution(spec)
        self._known = known
        self._noise = self._distribution.noise(seed, len(known), samples)
        state, previous = start(spec, floats)
        self.states: FloatRows = np.tile(state, (samples + 1, 1))
        self._previous: Floats = np.tile(previous.astype(np.float64), (samples + 1, 1))
        self._values: list[Floats] = []
        self._quantiles: list[Floats] = []

    @property
    def is_done(self) -> bool:
        """Whether all steps are decoded."""
        return len(self._values) == len(self._known)

    @property
    def rows(self) -> FloatRows:
        """The input of the next step, float32 [1 + S, F]: previous values and covariates."""
        covariates = np.tile(self._known[len(self._values)], (len(self._previous), 1))
        return np.concatenate([self._previous.astype(np.float32), covariates], axis=1)

    def advance(self, parameters: FloatRows, states: FloatRows) -> None:
        """Record the results of one step, and go to the next.

        Args:
            parameters: float32 [1 + S, P], the step's outputs.
            states: float32 [1 + S, M], the states after it.
        """
        along = self._distribution.quantiles(parameters[0])
        point = self._distribution.point(along)
        self._previous = point[np.newaxis]
        if len(parameters) > 1:
            samples = self._distribution.sample(parameters[1:], self._noise[len(self._values)])
            self._previous = np.concatenate([self._previous, samples])
        self._values.append(self._previous)
        self._quantiles.append(along)
        self.states = states

    def forecast(self) -> Forecast:
        """The forecast, once `is_done`."""
        values = np.stack(self._values)
        return Forecast(
            self._distribution.in_units(values[:, 0]),
            self._distribution.in_units(np.stack(self._quantiles), axis=-2),
            self._distribution.in_units(np.moveaxis(values[:, 1:], 0, 1)),
        )
