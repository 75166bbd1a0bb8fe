"""Trains a decoder: unrolled over the horizon from the encoder's states.

The encoder runs over a window in pieces, each from the state after the piece before, which gives
equal results and the states in between. At the end of every piece, an *anchor*, the decoder is
unrolled over the H steps that followed. Gradients flow through the decoder into the encoder, back
to the start of the window. The end of the first piece is random for each window, so that anchors
are on every hour and not only on the grid of windows.

The decoder is fed the true value or its own point forecast (Bengio et al. 2015, "Scheduled
sampling for sequence prediction with recurrent neural networks"): per anchor and step the truth
with probability s, which falls over the training's progress p from 0 to 1:

    teacher          s = 1                                  (teacher forcing, Williams 1989)
    linear           s = max(floor, 1 - p / (2 half_at))
    inverse_sigmoid  s = max(floor, k / (k + k^(p / half_at))),  k = 20

both of them one half at p = half_at. Unlike there, the point keeps its gradient, since a number
has one where a word has none. A true value that is absent is replaced by the point. Validation
feeds back the point alone, as serving does.

The loss is that of the distribution, on standardised values: pinball, or nats of the Gaussian;
its mean over the steps and targets that there are. Steps that do not follow regularly, or lie on
the other side of the split, do not count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.decoding.forecasts import decoder_of, start_parts
from models.events.schema import NumericField
from models.networks.build import Forward, StepNetwork
from models.networks.heads import Tensor, field_nats, forecast_standardised
from models.spec.decoder import DISTRIBUTION, LAST, MEDIAN, DecoderTraining, known_columns
from models.spec.heads import ForecastHead
from models.spec.layout import state_spec
from models.spec.training import ResolvedTraining
from models.training.plan import Plan, Window

STEEPNESS = 20.0
"""k of the inverse sigmoid: it begins at k / (k + 1)."""
LATEST = 100.0
"""Where the inverse sigmoid is as good as 0, and its power still a number."""


class Anchors(NamedTuple):
    """Where the decoder is unrolled in one window: A anchors, the first of all slots first.

    Attributes:
        cuts: int32 [n], where the pieces of the window end; A = n B.
        values: float32 [A, H, D], the true future values, encoded.
        there: bool [A, H, D], which of them exist and count.
        known: float32 [A, H, K], encoded.
        share: float32, probability of feeding back the truth.
        seed: int32 [2], of the draws of it.
    """

    cuts: NDArray[np.int32]
    values: NDArray[np.float32]
    there: NDArray[np.bool_]
    known: NDArray[np.float32]
    share: NDArray[np.float32]
    seed: NDArray[np.int32]


def truth_share(training: DecoderTraining, progress: float) -> float:
    """The probability that the truth is fed back, at a share of the training."""
    at = progress / training.half_at
    match training.feedback:
        case "teacher":
            return 1.0
        case "linear":
            return max(training.floor, 1 - at / 2)
        case "inverse_sigmoid":
            falling = STEEPNESS / (STEEPNESS + float(STEEPNESS ** min(at, LATEST)))
            return max(training.floor, falling)


def steps_ahead(
    side: NDArray[np.bool_], moments_ms: NDArray[np.int64], step_ms: int | None
) -> NDArray[np.int64]:
    """How many steps that count follow each row, one regular step after the other.

    Args:
        side: bool [rows], whether the step after a row exists and belongs to the split.
        moments_ms: int64 [rows].
        step_ms: between two of them; None if any time may pass between them.
    """
    is_followed = side.copy()
    if step_ms is not None:
        is_followed[:-1] &= np.diff(moments_ms) == step_ms
    rows = np.arange(len(side))
    stops = np.where(is_followed, len(side), rows)
    nearest = np.minimum.accumulate(stops[::-1])[::-1]
    return np.asarray(nearest - rows, np.int64)


class DecoderTrainer:
    """The decoder's part of a training loop; see the module. One thread only."""

    def __init__(self, network: StepNetwork, plan: Plan, training: ResolvedTraining, seed: int):
        """Take over a network that has a decoder."""
        spec = network.spec
        decoder, _, events = decoder_of(spec)
        if network.decoder is None:
            raise TypeError(f"model {spec.name!r}: expected a network with a decoder")
        self._network, self._step_network = network, network.decoder
        self._plan, self._training, self.seed = plan, training.decoder, seed
        self._window_steps = training.window_steps
        horizon = self._training.horizon or decoder.max_horizon
        self.horizon = min(horizon, decoder.max_horizon)
        index = events.column_index
        self._targets = [index[name] for name in decoder.targets]
        self._missing = [index.get(f"{name}.missing") for name in decoder.targets]
        self._known = [index[name] for name in known_columns(spec, decoder)]
        self._starts = start_parts(spec)
        self._last = state_spec(spec).slices[LAST]
        [self._head] = self._step_network.spec.heads
        self._fields = [events.field(name) for name in decoder.targets]
        self._median = decoder.head.quantiles.index(MEDIAN)
        self._ahead = {
            trained: steps_ahead(side, plan.moments_ms, decoder.step_ms)
            for trained, side in ((True, plan.trained), (False, plan.validated))
        }

    def anchors(self, window: Window, number: int, progress: float | None) -> Anchors:
        """The anchors of a window.

        Args:
            number: of the window, which decides the draws.
            progress: of the training; None validates, from the other side of the split.
        """
        batch_size, steps = window.index.shape
        random = np.random.default_rng([self.seed, number, progress is not None])
        cuts = self._cuts(steps, random)
        at = window.index[:, cuts - 1].T
        ahead = self._ahead[progress is not None][at]
        ahead = np.where(cuts[:, np.newaxis] <= window.lengths, ahead, 0)
        counts = np.arange(self.horizon) < ahead[..., np.newaxis]
        ahead_rows = at[..., np.newaxis] + 1 + np.arange(self.horizon)
        rows = self._plan.rows[np.where(counts, ahead_rows, 0)]
        there = np.stack(
            [
                counts if missing is None else counts & (rows[..., missing] < 0.5)
                for missing in self._missing
            ],
            axis=-1,
        )
        share = 0.0 if progress is None else truth_share(self._training, progress)
        flat = (len(cuts) * batch_size, self.horizon)
        return Anchors(
            cuts.astype(np.int32),
            rows[..., self._targets].reshape(*flat, -1),
            there.reshape(*flat, -1),
            rows[..., self._known].reshape(*flat, -1),
            np.array(share, np.float32),
            np.array([self.seed % 2**31, number], np.int32),
        )

    def _cuts(self, steps: int, random: np.random.Generator) -> NDArray[np.int64]:
        """Ends of the pieces of a window, each within 1..steps."""
        # Validation has longer windows, and as many pieces in each.
        longer = -(-steps // self._window_steps)
        every = min(self._training.anchor_steps * longer, steps)
        if self._network.spec.chunk_limit is not None or every == 1:
            # A network that sees a window as a whole must not see it in pieces.
            return np.array([steps], np.int64)
        count = steps // every
        # The last piece must not be empty.
        first = int(random.integers(1, every + (steps % every > 0)))
        return first + every * np.arange(count, dtype=np.int64)

    def forward(
        self, rows: Tensor, lengths: Tensor, state: Tensor, anchors: Anchors, training: bool
    ) -> tuple[Forward, Tensor]:
        """The encoder's pass over a window, and its states [A, N] at the anchors."""
        steps = rows.shape[1]
        if self._network.spec.chunk_limit is not None or steps == 1:
            result = self._network.forward(rows, lengths, state, training)
            return result, result.state
        count = anchors.cuts.shape[0]
        begins = [0, *(anchors.cuts[at] for at in range(count))]
        ends = [*begins[1:], steps]
        pieces: list[Forward] = []
        for begin, end in zip(begins, ends, strict=True):
            remaining = tf.clip_by_value(lengths - begin, 0, end - begin)
            piece = self._network.forward(rows[:, begin:end], remaining, state, training)
            pieces.append(piece)
            state = piece.state
        raw = {
            name: tf.ensure_shape(
                tf.concat([piece.raw[name] for piece in pieces], axis=1),
                [rows.shape[0], steps, None],
            )
            for name in pieces[0].raw
        }
        return Forward(raw, state, {}), tf.concat([piece.state for piece in pieces[:-1]], axis=0)

    def losses(self, states: Tensor, anchors: Anchors, training: bool) -> tuple[Tensor, Tensor]:
        """Sums of the losses and how many they are, by step of the horizon: float32 [H], [H]."""
        pieces = [
            tf.zeros((tf.shape(states)[0], part)) if isinstance(part, int) else states[:, part]
            for part in self._starts
        ]
        state = tf.concat(pieces, axis=-1)
        ones = tf.ones((tf.shape(state)[0],), tf.int32)
        coins = tf.random.stateless_uniform(
            tf.stack([tf.shape(state)[0], self.horizon]), anchors.seed
        )
        values = tf.convert_to_tensor(anchors.values)
        present = tf.convert_to_tensor(anchors.there)
        covariates = tf.convert_to_tensor(anchors.known)

        def one(step: Tensor, state: Tensor, previous: Tensor, sums: Any, counts: Any) -> Any:
            row = tf.concat([previous, covariates[:, step]], axis=-1)
            result = self._step_network.forward(row[:, tf.newaxis], ones, state, training)
            truth, there = values[:, step], present[:, step]
            loss, point = self._loss_and_point(result.raw[DISTRIBUTION], truth)
            total = tf.reduce_sum(tf.where(there, loss, 0.0))
            count = tf.reduce_sum(tf.cast(there, tf.float32))
            is_true = there & (coins[:, step, tf.newaxis] < anchors.share)
            next_value = tf.where(is_true, truth, point)
            return (
                step + 1,
                result.state,
                tf.ensure_shape(next_value, previous.shape),
                sums.write(step, total),
                counts.write(step, count),
            )

        # A loop in the graph, traced once, since horizons are long.
        *_, sums, counts = tf.while_loop(
            lambda step, *_: step < self.horizon,
            one,
            (
                tf.constant(0),
                tf.ensure_shape(state, [None, self._step_network.state_size]),
                tf.ensure_shape(states[:, self._last], [None, len(self._fields)]),
                tf.TensorArray(tf.float32, self.horizon),
                tf.TensorArray(tf.float32, self.horizon),
            ),
            shape_invariants=(
                tf.TensorShape([]),
                tf.TensorShape([None, self._step_network.state_size]),
                tf.TensorShape([None, len(self._fields)]),
                tf.TensorShape(None),
                tf.TensorShape(None),
            ),
            maximum_iterations=self.horizon,
        )
        return sums.stack(), counts.stack()

    def _loss_and_point(self, raw: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and points [A, D] of raw values [A, 1, U]."""
        if isinstance(self._head, ForecastHead):
            values = forecast_standardised(self._head, raw)[:, 0]
            levels = tf.constant(self._head.quantiles, tf.float32)
            error = truth[..., tf.newaxis] - values
            loss = tf.reduce_mean(tf.maximum(levels * error, (levels - 1.0) * error), axis=-1)
            return loss, values[..., self._median]
        values = tf.reshape(raw, (-1, len(self._fields), 2))
        nats = [
            field_nats(field, values[:, at], truth[:, at])
            for at, field in enumerate(self._fields)
            if isinstance(field, NumericField)
        ]
        return tf.stack(nats, axis=-1), values[..., 0]


def mean_loss(sums: Any, counts: Any) -> Any:
    """The loss of all steps together; 0 if nothing counted."""
    return tf.reduce_sum(sums) / tf.maximum(tf.reduce_sum(counts), 1.0)
