"""The nats of events, -log of their tail probabilities, from their statistics.

With one tail for all streams, the tail probabilities of all statistics are combined by their
harmonic mean, which has a tail again. With a tail of each stream, three kinds of quantities have
one each: the level of each numeric target and the joint nats (`models.detection.long_means`), and
the statistics of each target (`models.detection.statistics`), which are combined as before. The
nats of an event are the largest of five groups, the levels, the joint nats and both means of them,
and the targets, each less the logarithm of its size, and less that of their number (Bonferroni's
bound, which holds for dependent probabilities).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.detection.alarms import Tails, combine
from models.detection.long_means import LongMeans
from models.detection.statistics import Bools, Channels, Deviations, Events, FloatRows, Floats
from models.detection.stream_tails import StreamTails
from models.events.schema import NumericField
from models.spec.detection import JOINT_SCALES, StreamTailsFit, Tail
from models.spec.layout import detection_of
from models.spec.model import ModelSpec

LEAST_NATS: Final = 1e-9
"""Of a forecast, so that there are shares of nats that are all 0."""


class Scores(NamedTuple):
    """The nats [B, T] of events, what computes the weights [C, B, T] of the channels in them, the
    state after them, and with long means how far each level is from its own [N, B, T]."""

    nats: Floats
    weights: Callable[[], Floats]
    state: FloatRows
    levels: Floats | None = None


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

    def score(self, deviations: Deviations, lengths: NDArray[Any]) -> Scores:
        """Score events, given their deviations."""
        del lengths
        statistics, state = deviations.statistics, deviations.state
        inverse = np.exp(self._tails.nats(statistics.reshape(len(statistics), -1)))
        nats = self._combined.nats(combine(inverse)[np.newaxis])
        weights = partial(self._channels.by_channel, inverse.reshape(statistics.shape))
        return Scores(nats.reshape(statistics.shape[1:]), weights, state)


class StreamScorer:
    """Scores events by the tails of their streams.

    Args:
        spec: a model whose `detection` has `tail_memory_events`.
        memory_events: these.
        channels: of the model.
        tails: pooled, of the statistics.
        fit: of the tails of each stream.
    """

    def __init__(
        self,
        spec: ModelSpec,
        memory_events: int,
        channels: Channels,
        tails: tuple[Tail, ...],
        fit: StreamTailsFit,
    ):
        detection, head, events = detection_of(spec)
        self._channels, self._tails = channels, Tails(tails)
        self._long = LongMeans(spec, memory_events, np.array(fit.spreads), fit.joint_mean)
        self._pooled, self._own = Tails(fit.tails), StreamTails(spec, memory_events)
        self._by_target = TargetStatistics(channels)
        places = self._by_target.places
        joint = 1 + len(JOINT_SCALES)
        self._levels = len(fit.tails) - joint - len(places)
        self._joint = slice(self._levels, self._levels + joint)
        sizes = [self._levels] * self._levels + [1] * joint + [len(places)] * len(places)
        groups = (self._levels > 0) + joint + 1
        self._less = np.log(np.array(sizes) * groups)[:, np.newaxis, np.newaxis]
        labels = [each.label for each in detection.channels_of(head.targets, events)]
        names = [each.target for each in detection.channels_of(head.targets, events)]
        self._target = np.searchsorted(places, [head.targets.index(name) for name in names])
        self._first = np.array([names.index(head.targets[place]) for place in places])

        def channel(target: str, kind: str) -> int:
            label = f"{target}.{kind}"
            return labels.index(label) if label in labels else names.index(target)

        numeric = [t for t in head.targets if isinstance(events.field(t), NumericField)]
        self._level = [channel(target, "level") for target in numeric]
        self._forecast = [channel(head.targets[place], "forecast") for place in places]

    def score(self, deviations: Deviations, lengths: NDArray[Any]) -> Scores:
        """Score events, given their deviations."""
        statistics, state, events = deviations[2:]
        shape = statistics.shape[1:]
        inverse = np.exp(self._tails.nats(statistics.reshape(len(statistics), -1)))
        nats = self._channels.nats(events)
        long, levels, state = self._long.follow(events, nats, lengths, state)
        values = np.concatenate([long, self._by_target.combine(inverse).reshape(-1, *shape)])
        pooled = self._pooled.nats(values.reshape(len(values), -1)).reshape(values.shape)
        own, state = self._own.follow(pooled, self._present(events), lengths, state)
        combined = np.maximum((own - self._less).max(axis=0), 0.0)
        weights = partial(self._weights, own, nats, inverse.reshape(statistics.shape))
        return Scores(combined, weights, state, levels)

    def _present(self, events: Events) -> Bools | None:
        """Whether each event has the quantity of each tail, [tails, B, T]; None if all have."""
        if events.is_complete:
            return None
        present = self._long.present(events)
        joint = np.repeat(present[-1:], 1 + len(JOINT_SCALES), axis=0)
        return np.concatenate([present[:-1], joint, events.present[self._by_target.places]])

    def _weights(self, own: Floats, nats: Floats, inverse: Floats) -> Floats:
        """Weights [C, B, T]: of a target's statistics by channel, of a level to its channel, and of
        the joint nats to the forecasts with the most."""
        weights = np.exp(own)
        by_channel = self._channels.by_channel(inverse)
        # the channels of a target follow each other
        total = np.add.reduceat(by_channel, self._first, axis=0)
        by_channel *= (weights[self._joint.stop :] / total)[self._target]
        for at, channel in enumerate(self._level):
            by_channel[channel] += weights[at]
        surprising = np.maximum(nats[self._by_target.places], 0.0) + LEAST_NATS
        surprising *= weights[self._joint].sum(axis=0) / surprising.sum(axis=0)
        for at, channel in enumerate(self._forecast):
            by_channel[channel] += surprising[at]
        return by_channel


class TargetStatistics:
    """Combines the statistics of each target that has channels.

    Attributes:
        places: of these targets among all.
    """

    def __init__(self, channels: Channels):
        targets = channels.targets_of_statistics()
        self.places = np.unique(targets)
        members = (targets == self.places[:, np.newaxis]).astype(np.float64)
        self._means = members / members.sum(axis=1, keepdims=True)

    def combine(self, inverse: Floats) -> Floats:
        """-log of the harmonic mean of the tail probabilities of each target, [D, n], given the
        inverses [K, n] of all."""
        return np.asarray(np.log(self._means @ inverse))
