"""The nats of events, -log of their tail probabilities, from their statistics.

With one tail for all streams, the tail probabilities of all statistics are combined by their
harmonic mean, which has a tail again. With a tail of each stream, few quantities have one each: the
statistics of levels and changes (`models.detection.long_means`), and the harmonic mean of those of
all channels. The norm of order 3 of their nats has a pooled tail again. There is one quantity for
all targets rather than one for each, since a bound for many of them hides what a few show.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

import numpy as np

from models.detection.alarms import Tails, combine
from models.detection.long_means import LongMeans, LongStatistics
from models.detection.statistics import (
    Bools,
    Channels,
    Deviations,
    Events,
    Floats,
    StateParts,
    columns_of,
)
from models.detection.stream_tails import StreamTails
from models.events.schema import NumericField
from models.spec.detection import StreamTailsFit, Tail
from models.spec.layout import detection_of
from models.spec.model import ModelSpec

LEAST: Final = 1e-9
"""Of a weight, so that there are shares where all are 0."""


class Scores(NamedTuple):
    """The nats [B, T] of events, what computes the weights [C, B, T] of the channels in them, and
    what long means say of them."""

    nats: Floats
    weights: Callable[[], Floats]
    long: LongStatistics | None = None


class PooledScorer:
    """Scores events by one tail for all streams.

    Args:
        channels: of the model.
        tails: of the statistics.
        combined: of all of them together.
    """

    def __init__(self, channels: Channels, tails: tuple[Tail, ...], combined: Tail):
        self._channels = channels
        self._tails, self._combined = Tails(tails), Tails([combined])

    def score(self, deviations: Deviations, parts: StateParts) -> Scores:
        """Score events, given their deviations."""
        del parts
        statistics = deviations.statistics
        inverse = np.exp(self._tails.nats(statistics.reshape(len(statistics), -1)))
        nats = self._combined.nats(combine(inverse)[np.newaxis])
        weights = partial(self._channels.by_channel, inverse.reshape(statistics.shape))
        return Scores(nats.reshape(statistics.shape[1:]), weights)


class StreamScorer:
    """Scores events by the tails of their streams.

    Args:
        spec: a model whose `detection` has `tail_memory_events`.
        memory_events: these.
        channels: of the model.
        tails: pooled, of the statistics.
        fit: of the tails of each stream.
        combined: pooled, of the nats by all of these together; None gives these nats as they are.
    """

    def __init__(
        self,
        spec: ModelSpec,
        memory_events: int,
        channels: Channels,
        tails: tuple[Tail, ...],
        fit: StreamTailsFit,
        combined: Tail | None,
    ):
        detection, head, events = detection_of(spec)
        self._channels, self._tails = channels, Tails(tails)
        self._long = LongMeans(spec, memory_events)
        self._pooled, self._own = Tails(fit.tails), StreamTails(spec, memory_events)
        self._combined = None if combined is None else Tails([combined])
        labels = [each.label for each in detection.channels_of(head.targets, events)]
        names = [each.target for each in detection.channels_of(head.targets, events)]
        numeric = [t for t in head.targets if isinstance(events.field(t), NumericField)]
        # of the level of each numeric target, and of its change; without it of the first
        self._places = [
            columns_of(
                [
                    labels.index(x) if (x := f"{t}.{kind}") in labels else names.index(t)
                    for t in numeric
                ]
            )
            for kind in ("level", "change")
            if numeric
        ]
        self._numeric = columns_of([head.targets.index(target) for target in numeric])

    def score(self, deviations: Deviations, parts: StateParts) -> Scores:
        """Score events, given their deviations; updates the states."""
        statistics, events = deviations.statistics, deviations.events
        shape = statistics.shape[1:]
        inverse = np.exp(self._tails.nats(statistics.reshape(len(statistics), -1)))
        long = self._long.follow(events, parts)
        values = long_and_channels(long, inverse)
        pooled = self._pooled.nats(values).reshape(len(values), *shape)
        own = self._own.follow(pooled, self._present(events, len(values)), parts)
        # their norm of order 3: several large ones count more than one, the largest ones most
        cubes = own * np.square(own)
        nats = np.cbrt(cubes.sum(axis=0)).ravel()
        if self._combined is not None:
            nats = self._combined.nats(nats[np.newaxis])[0]
        weights = partial(self._weights, cubes, long.squares, inverse.reshape(statistics.shape))
        return Scores(nats.reshape(shape), weights, long)

    def _present(self, events: Events, tails: int) -> Bools | None:
        """Whether each event has the quantity of each tail, [tails, B, T]; None if all have."""
        if events.is_complete:
            return None
        present = np.empty((tails, *events.present.shape[1:]), np.bool_)
        present[:-1] = events.present[self._numeric].any(axis=0)
        present[-1] = events.present.any(axis=0)
        return present

    def _weights(self, cubes: Floats, squares: Floats, inverse: Floats) -> Floats:
        """Weights [C, B, T]: the part of the channels' own tail by their statistics, those of
        levels and changes by the targets that are far off."""
        by_channel = self._channels.by_channel(inverse)
        by_channel *= cubes[-1] / by_channel.sum(axis=0)
        if self._places:
            off, shape = squares + LEAST, cubes.shape[1:]
            parts = cubes[:-1].reshape(2, -1, *shape).sum(axis=1, keepdims=True)
            off *= parts / off.sum(axis=1, keepdims=True)
            for places, of_kind in zip(self._places, off, strict=True):
                by_channel[places] += of_kind
        by_channel += LEAST
        return by_channel


def long_and_channels(long: LongStatistics, inverse: Floats) -> Floats:
    """The quantities [tails, B T] that have tails of each stream, given the inverse tail
    probabilities [K, B T] of the statistics of the channels."""
    return np.concatenate(
        [long.statistics.reshape(-1, inverse.shape[1]), combine(inverse)[np.newaxis]]
    )
