"""Options that a specification leaves open: of training, derived from the data, and of detection.

Windows and batches become smaller until an epoch has enough updates of the weights, and epochs more
until a training has. Moments of the split are those by which shares of the events are past. What
is derived depends on the data alone, so that a repeated training is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np

from models.errors import DataError
from models.events.calendar import DAY_MS
from models.events.frame import resolve_forms
from models.events.schema import EventSchema, NumericField
from models.events.values import apply_transform
from models.spec.chunking import DEFAULT_CHUNK_STEPS, chunking_of
from models.spec.detection import MAX_SEASON_EVENTS
from models.spec.layout import detection_of
from models.spec.model import ModelSpec, schema_of
from models.spec.training import ResolvedTraining, TrainingSpec
from models.training.data import (
    POSITIONS,
    Streams,
    moment_ms,
    moment_text,
    unresolved_training_of,
)
from models.training.plan import groups_of, segments_of
from models.training.season import MAX_EVENTS, find_season

VALIDATE_SHARE, TEST_SHARE = 0.7, 0.85
"""Shares of the events before `validate_from` and before `test_from`."""
SMALL_BATCH_STREAMS, BATCH_STREAMS = 8, 32
SMALL_WINDOW_STEPS, WINDOW_STEPS = 16, 64
WHOLE_STEPS = 4096
SEGMENT_WINDOWS = 16
MIN_WINDOWS_PER_EPOCH = 24
UPDATES = 2000
"""Windows of a whole training: fewer leave small networks undertrained."""
MIN_EPOCHS, MAX_EPOCHS = 20, 150
QUICK_SHARE = 4
"""Divisor of the epochs of a quick training, which has one network."""
MIN_PATIENCE = 3
LEARNING_RATE, SMALL_BATCH_LEARNING_RATE = 2e-3, 5e-3
TIME_LIMIT_S = 600.0
WEEK_DAYS = 7
SEASON_VALUES = 16_384
"""Most values of a derived season in the state of one stream: 64 KiB."""
HOLD_EVENTS, CLOSE_ABOVE, BACKOFF_NATS = 6, 0.01, 1.0


def resolve_training(
    spec: ModelSpec, streams: Streams, source: str = "data", *, quick: bool = False
) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec with every training option, and the options that were derived.

    Args:
        spec: with `events` and `training`.
        streams: the table.
        source: what errors call the table.
        quick: fewer epochs and one network, whatever the spec says.

    Raises:
        DataError: all events have the same moment, and the split is to be derived.
        SpecError: a moment of the split cannot be read.
    """
    training = unresolved_training_of(spec)
    derived = _split(schema_of(spec), training, streams, source)
    settled = training.model_copy(update=derived)
    if settled.is_split_by_share:
        before = round((1 - (settled.validate_share or 0) - (settled.test_share or 0)) * POSITIONS)
    else:
        before = moment_ms(schema_of(spec), settled.validate_from or "", "training.validate_from")
    longest = max(stop - start for start, stop in streams.sessions)
    derived |= _sizes(spec, settled, _lengths_before(streams, before), longest)
    if quick:
        epochs = int(derived.get("epochs") or training.epochs or 1)
        derived |= {"epochs": ceil(epochs / QUICK_SHARE), "members": 1, "seeds": 1}
    resolved = ResolvedTraining.model_validate({**training.model_dump(), **derived})
    return spec.model_copy(update={"training": resolved.model_dump()}), derived


def resolve_detection(spec: ModelSpec) -> ModelSpec:
    """The spec with the options of detection that it leaves open.

    Artifacts have all options; the defaults of `DetectionSpec` are those of older ones.
    """
    if spec.detection is None:
        return spec
    detection, alarm = spec.detection, spec.detection.alarm
    options: dict[str, Any] = {}
    if "hold_events" not in alarm.model_fields_set:
        options["hold_events"] = HOLD_EVENTS
    if "backoff_nats" not in alarm.model_fields_set:
        options["backoff_nats"] = BACKOFF_NATS
    if not alarm.model_fields_set & {"close_above", "hysteresis"}:
        options["close_above"] = CLOSE_ABOVE
    changed = detection.model_copy(update={"alarm": alarm.model_copy(update=options)})
    return spec.model_copy(update={"detection": changed})


def resolve_season(
    spec: ModelSpec, streams: Streams, before_key: int
) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec with `season_events` of its detection, and the option if it was derived.

    Args:
        spec: as it was written; `season_events: null` is kept. Without a numeric target there is
            no season.
        streams: the table.
        before_key: key of the split; the season is that of earlier events.
    """
    if spec.detection is None or "season_events" in spec.detection.model_fields_set:
        return spec, {}
    detection, head, schema = detection_of(spec)
    targets = [
        field for name in head.targets if isinstance(field := schema.field(name), NumericField)
    ]
    if not targets:
        return spec, {}
    past = [
        start + np.flatnonzero(streams.split_keys[start:stop] < before_key)[-MAX_EVENTS:]
        for start, stop in streams.sessions
    ]
    columns = streams.columns
    # by target, so that those that are chosen of many are of every target
    series = [
        np.where(present[rows], values[rows], np.nan)
        for present, values in (
            (columns.present[field.name], apply_transform(field, columns.values[field.name]))
            for field in targets
        )
        for rows in past
    ]
    steps_ms = np.concatenate([np.diff(streams.moments_ms[rows]) for rows in past])
    step_ms = float(np.median(steps_ms)) if len(steps_ms) else 0.0
    days = [round(days * DAY_MS / step_ms) for days in (1, WEEK_DAYS)] if step_ms > 0 else []
    longest = min(MAX_SEASON_EVENTS, SEASON_VALUES // len(targets))
    season = find_season(series, longest, days)
    detection = detection.model_copy(update={"season_events": season})
    return spec.model_copy(update={"detection": detection}), {"season_events": season}


def _split(
    schema: EventSchema, training: TrainingSpec, streams: Streams, source: str
) -> dict[str, Any]:
    """The open moments of the split, or the open share."""
    derived: dict[str, Any] = {}
    if training.is_split_by_share:
        shares = {"validate_share": TEST_SHARE - VALIDATE_SHARE, "test_share": 1 - TEST_SHARE}
        open_shares = [name for name in shares if getattr(training, name) is None]
        return {name: round(shares[name], 6) for name in open_shares}
    moments = np.sort(streams.moments_ms)
    if training.validate_from is None:
        end, share = len(moments), VALIDATE_SHARE
        if training.test_from is not None:
            test_ms = moment_ms(schema, training.test_from, "training.test_from")
            end, share = int(np.searchsorted(moments, test_ms)), VALIDATE_SHARE / TEST_SHARE
        later = moments[:end][moments[:end] > moments[0]]
        if len(later) == 0:
            raise DataError(
                expected=f"{source}: events at several times, of which later ones validate; or "
                "`validate_from` in `training`",
                got="all at one time",
            )
        derived["validate_from"] = moment_text(schema, max(moments[int(share * end)], later[0]))
    if training.test_from is None:
        validate_from = training.validate_from or derived["validate_from"]
        validate_ms = moment_ms(schema, validate_from, "training.validate_from")
        rest = moments[moments >= validate_ms]
        later = rest[rest > validate_ms]
        # Without later events there is nothing to hold out: the test begins after the last one.
        share = (TEST_SHARE - VALIDATE_SHARE) / (1 - VALIDATE_SHARE)
        test_ms = max(rest[int(share * len(rest))], later[0]) if len(later) else validate_ms + 1
        derived["test_from"] = moment_text(schema, test_ms)
    return derived


def calendar_warning(spec: ModelSpec, streams: Streams, before_key: int) -> str | None:
    """A line if training sees less than a week of a timestamp, whose weekdays it encodes."""
    time = schema_of(spec).timestamp
    moments, before_ms = streams.moments_ms, before_key
    if unresolved_training_of(spec).is_split_by_share:
        before_ms = int(np.max(moments[streams.split_keys < before_key]))
    days = (before_ms - int(np.min(moments))) / DAY_MS
    if time is None or "weekday" not in time.calendar or days >= WEEK_DAYS:
        return None
    return (
        f"the events before validation span {days:.1f} days, so that the network meets "
        "weekdays that it never saw: have two weeks, or leave `weekday` out of the `calendar` of "
        f"{time.name!r}"
    )


def season_warning(spec: ModelSpec, streams: Streams, before_key: int) -> str | None:
    """A line if no series repeats the season of detection before validation."""
    season = None if spec.detection is None else spec.detection.season_events
    before = streams.split_keys < before_key
    longest = max(np.count_nonzero(before[start:stop]) for start, stop in streams.sessions)
    if season is None or longest > season:
        return None
    return (
        f"no stream has more than {longest} events before validation, so that none repeats the "
        f"`season_events` of {season}, and levels are compared with the mean: have more events, or "
        "a shorter season"
    )


def quick_warning(spec: ModelSpec) -> str:
    """What a quick training leaves out.

    Args:
        spec: as it was written.
    """
    networks = unresolved_training_of(spec).networks
    one = f", one network instead of {networks}" if networks > 1 else ""
    return (
        f"trained with --quick, a quarter of the epochs{one}: train without it before judging the "
        "model"
    )


def index_warning(spec: ModelSpec, streams: Streams) -> str | None:
    """A line if the timestamps count rows or events, from 0 or 1, instead of milliseconds."""
    time = schema_of(spec).timestamp
    if time is None or int(np.max(streams.moments_ms)) > streams.events:
        return None
    return (
        f"the values of {time.name!r} are read as milliseconds of 1970-01-01, got at most "
        f"{streams.events}: if they count events, multiply them by the milliseconds between two"
    )


def zone_warning(spec: ModelSpec, streams: Streams) -> str | None:
    """A line if times without an offset are read as UTC because the specification has no zone.

    Args:
        spec: as it was written: its schema is not fitted.
    """
    schema = schema_of(spec)
    time = resolve_forms(schema, streams.frame).timestamp
    if time is None or time.without_offset != "local" or "timezone" in schema.model_fields_set:
        return None
    return (
        f"the times of {time.name!r} without an offset are read as UTC: name their zone, such as "
        "Europe/Vienna, as `timezone` of the events (or UTC, if they are)"
    )


def _lengths_before(streams: Streams, before_key: int) -> list[int]:
    """Events of each session before a key of the split."""
    past = np.append(0, np.cumsum(streams.split_keys < before_key))
    return [int(past[stop] - past[start]) for start, stop in streams.sessions]


def _sizes(
    spec: ModelSpec, training: TrainingSpec, lengths: Sequence[int], longest: int
) -> dict[str, Any]:
    """Open windows, batches, learning rate, epochs and time limit.

    Args:
        lengths: training events of each session.
        longest: events of the longest session, whether they are trained on or not.
    """
    events = sum(lengths)
    window, batch = training.window_steps, training.batch_streams
    shrinks = False
    if window is None:
        kind = chunking_of(spec.layers, blocks=False)
        limit = WHOLE_STEPS if spec.blocks is not None else spec.max_chunk_steps
        if kind == "whole":
            window = min(longest, limit or DEFAULT_CHUNK_STEPS, WHOLE_STEPS)
        elif kind == "per_chunk":
            window = min(WINDOW_STEPS, limit or DEFAULT_CHUNK_STEPS)
        else:
            window, shrinks = WINDOW_STEPS, True
    if batch is None:
        batch = BATCH_STREAMS
        while batch > SMALL_BATCH_STREAMS and events < MIN_WINDOWS_PER_EPOCH * window * batch:
            batch //= 2
    while (
        shrinks and window > SMALL_WINDOW_STEPS and events < MIN_WINDOWS_PER_EPOCH * window * batch
    ):
        window //= 2
    # Long streams are cut into enough segments to fill two batches.
    segment = training.segment_windows or max(
        1, min(SEGMENT_WINDOWS, events // (2 * batch * window))
    )
    updates = max(1, _windows_per_epoch(lengths, window, segment, batch))
    epochs = training.epochs or min(MAX_EPOCHS, max(MIN_EPOCHS, ceil(UPDATES / updates)))
    small = batch < BATCH_STREAMS
    values = {
        "window_steps": window,
        "segment_windows": segment,
        "batch_streams": batch,
        "learning_rate": SMALL_BATCH_LEARNING_RATE if small else LEARNING_RATE,
        "epochs": epochs,
        "patience": max(MIN_PATIENCE, epochs // 6),
    }
    if training.epochs is None:
        values["time_limit_s"] = TIME_LIMIT_S
    return {name: value for name, value in values.items() if getattr(training, name) is None}


def _windows_per_epoch(lengths: Sequence[int], window: int, segment: int, batch: int) -> int:
    spans = [(0, length) for length in lengths]
    segments = segments_of(spans, window * segment)
    return sum(
        ceil(max(segments[at].steps for at in group) / window)
        for group in groups_of(segments, batch)
    )
