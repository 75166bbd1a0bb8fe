"""Follows streams in the compiled `kernel.c`, which has the equations of detection.

States are float32, and all else is computed in float64, event after event.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.detection.alarms import Columns, Rule
from models.detection.library import address_of, load_library
from models.detection.tails import MIN_SHAPE
from models.detection.targets import Target, targets_of
from models.errors import SpecError
from models.events.schema import BooleanField, CategoricalField, NumericField
from models.spec.detection import AVERAGED_EVENTS, AVERAGED_KINDS, CHANNEL_KINDS, Tail
from models.spec.layout import detection_columns, detection_of
from models.spec.model import ModelSpec

FloatRows = NDArray[np.float32]
Floats = NDArray[np.float64]

BLOCK: Final = 32
"""Events of a stream after which the counts of its own tails change, as in `kernel.c`."""
KNOWN_NATS: Final = 3.0
KNOWN_WEIGHT: Final = 200.0
"""Weight of the pooled tail at levels up to `KNOWN_NATS`, where it is known best."""
WEIGHT: Final = 20.0
"""Weight of the pooled tail at each other level."""
LONG: Final = 4096
"""Values of rows from which on a call releases the global interpreter lock."""
MIN_CHANNEL_WEIGHT: Final = 1e-9
"""Added to each weight, so that shares are defined where all are 0."""
_PARTS: Final = (
    *("events", "weight", "last", "mean", "rest", "distance", "spread", "peak", "average", "run"),
    *("longest", "season", "season_weight", "season_gain", "tail_counts", "tail_pending"),
    *("tail_filled", "alarm", "alarm_since", "alarm_excess", "alarm_events", "alarm_nats"),
)


class _Parts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in _PARTS]


class Model(ctypes.Structure):
    """`model_t` of `kernel.c`."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("targets", "numeric", "quantities", "levels")),
        *((name, ctypes.c_int32) for name in ("season_events", "row_size")),
        ("at", _Parts),
        *((name, ctypes.c_double) for name in ("decay", "fourth_root_decay", "block_decay")),
        *((name, ctypes.c_double) for name in ("prior_events", "slow")),
        *((name, ctypes.c_void_p) for name in ("target", "level", "tail", "combined")),
        ("alarm", Rule),
        ("columns", Columns),
    ]


class _Events(ctypes.Structure):
    """`events_t` of `kernel.c`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "steps", "output_size", "first")),
        *((name, ctypes.c_int64) for name in ("state_size", "part")),
        *((name, ctypes.c_void_p) for name in ("lengths", "rows", "outputs", "states", "scored")),
        *((name, ctypes.c_void_p) for name in ("thresholds", "details")),
    ]


class KernelOutputs(NamedTuple):
    """Of T events of B streams; 0 beyond a stream's length.

    The R entries of an event are the forecasts of the D targets, the levels of the N numeric ones,
    their changes, and their runs.

    Attributes:
        details: [B, T, 1 + 2Q + 2R], all that follows.
        nats: [B, T], -log of the tail probabilities; 0 without tails.
        quantities: [B, T, Q].
        cubes: [B, T, Q], of the own nats of the quantities; 0 without tails.
        errors: [B, T, R], e: of forecasts in predicted deviations, of categorical and
            boolean targets the square root of twice the nats, of levels and changes as the values
            come, of runs events.
        squares: [B, T, R], (a e / p_before)^2, of levels of several targets (a e / q_before)^2; of
            runs the square of the quantity of one target.
    """

    details: Floats
    nats: Floats
    quantities: Floats
    cubes: Floats
    errors: Floats
    squares: Floats

    @property
    def deviations(self) -> Floats:
        """The roots of `squares`, with the signs of `errors`, [B, T, R]."""
        return np.copysign(np.sqrt(self.squares), self.errors)


class Kernel:
    """Follows the streams of one model.

    Args:
        spec: with `detection`.
        tails: pooled, one for each quantity; empty: no nats and no alarms.
        combined: pooled, of the norm of the nats of all quantities; None: nats are this norm.
        columns: of outputs; None: none are written.

    Raises:
        SpecError: there are fewer or more tails than quantities.

    Attributes:
        order: int [C], the entry of each channel.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tails: Sequence[Tail] = (),
        combined: Tail | None = None,
        columns: Columns | None = None,
    ):
        detection, head, events = detection_of(spec)
        targets = targets_of(spec)
        names = [t.field.name for t in targets if isinstance(t.field, NumericField)]
        self._targets, self._numeric = len(targets), len(names)
        self._kinds = AVERAGED_KINDS if names else 0
        self._entries = self._targets + (self._kinds + 1) * self._numeric
        self._quantities = 2 * self._kinds + bool(names) + 1
        if tails and len(tails) != self._quantities:
            raise SpecError(
                f"model {spec.name!r}: expected a fit with {self._quantities} tails of "
                f"`detection`, got {len(tails)}: train the model again"
            )
        entries = [("forecast", name) for name in head.targets]
        entries += [(kind, name) for kind in CHANNEL_KINDS[1:] for name in names]
        channels = detection.channels_of(head.targets, events)
        self.order = np.array([entries.index((each.kind, each.target)) for each in channels])
        sizes = 0, 1, self._quantities, self._quantities, self._entries, self._entries
        self._sections = [slice(*ends) for ends in pairwise(accumulate(sizes))]
        parts = detection_columns(spec)
        levels = np.array(detection.tail_levels)
        weights = np.where(levels <= KNOWN_NATS, KNOWN_WEIGHT, WEIGHT)[1:]
        priors = weights * np.exp(-np.diff(levels))
        # the model points to these
        self._arrays = (
            _target_rows(targets),
            np.stack([levels, np.append(weights, 0), np.append(priors, 0)], axis=1),
            _tail_rows(tails) if tails else None,
            None if combined is None else _tail_rows([combined]),
        )
        target, level, tail, of_norm = (address_of(array) for array in self._arrays)
        decay = float(np.exp(-1.0 / detection.memory_events))
        self._model = Model(
            targets=self._targets,
            numeric=self._numeric,
            quantities=self._quantities,
            levels=len(levels),
            season_events=detection.season_events or 0,
            row_size=spec.input_features,
            at=_Parts(*(parts[name].start if name in parts else -1 for name in _PARTS)),
            decay=decay,
            fourth_root_decay=decay**0.25,
            block_decay=decay**BLOCK,
            prior_events=detection.prior_events,
            slow=math.exp(-1.0 / AVERAGED_EVENTS),
            target=target,
            level=level,
            tail=tail,
            combined=of_norm,
            alarm=Rule.of(detection.alarm),
            columns=columns or Columns(),
        )
        self._call = load_library().follow_streams
        self._long_call = load_library(ctypes.CDLL).follow_streams
        self._reference = ctypes.byref(self._model)

    def zeros(self, batch: int, steps: int) -> KernelOutputs:
        """Numbers of events for `follow` to write, all 0."""
        details = np.zeros((batch, steps, self._sections[-1].stop))
        nats, *others = (details[..., section] for section in self._sections)
        return KernelOutputs(details, nats[..., 0], *others)

    def follow(
        self,
        rows: FloatRows,
        lengths: ArrayLike,
        outputs: FloatRows,
        first: int,
        states: FloatRows,
        part: int = 0,
        scored: FloatRows | None = None,
        thresholds: Floats | None = None,
        kept: KernelOutputs | None = None,
    ) -> int:
        """Follow the next events of each stream; returns how many alarms opened.

        Args:
            rows: [B, T, F], encoded; anything beyond a length.
            lengths: int [B], 0..T.
            outputs: [B, T, O'], of which the columns from `first` on are the parameters of each
                event's forecast, made before it.
            states: float32 [B, W], contiguous, of which the columns from `part` on are as
                `models.spec.layout.detection_state` says, and updated.
            scored: float32 [B, T, O], contiguous, written as `columns` say; None: alarms are not
                followed.
            thresholds: [B, 2], contiguous, -log of the tail probability from which an event is
                unusual enough, and the specified alarms per event; None: those of `columns`.
            kept: of `zeros`; written.
        """
        lengths = np.ascontiguousarray(lengths, np.int32)
        rows = np.ascontiguousarray(rows, np.float32)
        outputs = np.ascontiguousarray(outputs, np.float32)
        arrays = lengths, rows, outputs, states, scored, thresholds, kept and kept.details
        sizes = *rows.shape[:2], outputs.shape[2], first, states.shape[1], part
        events = _Events(*sizes, *map(address_of, arrays))
        call = self._call if rows.size < LONG else self._long_call
        opened: int = call(self._reference, ctypes.byref(events))
        return opened

    def shares(self, squares: Floats, cubes: Floats) -> Floats:
        """How much each channel counts in the nats of events, [..., C], 1 in sum: the cubes of each
        kind of channels, by how far each target is off.

        Args:
            squares: [..., R], those of `KernelOutputs`, of all or some events.
            cubes: [..., Q], those of the same ones.
        """
        weights, lead = squares + MIN_CHANNEL_WEIGHT, cubes.shape[:-1]
        averaged = 2 * self._kinds
        forecasts, others = weights[..., : self._targets], weights[..., self._targets :]
        by_forecast = cubes[..., averaged, np.newaxis] + MIN_CHANNEL_WEIGHT
        forecasts *= by_forecast / forecasts.sum(axis=-1, keepdims=True)
        if self._kinds:
            by_kind = cubes[..., :averaged].reshape(*lead, self._kinds, 2).sum(axis=-1)
            by_kind = np.concatenate([by_kind, cubes[..., -1:]], axis=-1) + MIN_CHANNEL_WEIGHT
            others = others.reshape(*lead, self._kinds + 1, self._numeric)
            others *= (by_kind / others.sum(axis=-1))[..., np.newaxis]
        return np.asarray((weights / weights.sum(axis=-1, keepdims=True))[..., self.order])


def _target_rows(targets: Sequence[Target]) -> NDArray[np.int32]:
    """`target_t` of each target, [D, 6]."""
    kinds, rows = (NumericField, BooleanField, CategoricalField), []
    for each in targets:
        missing = -1 if each.missing is None else each.missing
        start, stop = each.parameters.start, each.parameters.stop
        columns = (each.encoded, each.raw, missing, start, stop - start)
        rows.append((kinds.index(type(each.field)), *columns))
    return np.array(rows, np.int32)


def _tail_rows(tails: Sequence[Tail]) -> Floats:
    """`tail_t` of each tail, [number, 5]."""
    rows = []
    for tail in tails:
        base, shape = -math.log(tail.exceeded), max(tail.shape, MIN_SHAPE)
        rows.append((tail.threshold, base / tail.threshold, base, shape / tail.scale, shape))
    return np.array(rows, np.float64)
