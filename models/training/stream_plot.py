"""Plots one stream over time: its values with their forecasts, scores, alarms, and labels.

The model runs over the whole stream, as the service would, so that what is shown are the values
that the service replies. From top to bottom:

- every numeric field that a head predicts, with the forecast that was made before the event: mean
  and 95% interval of an anomaly head with detection, median and outer quantiles of a forecast head;
- the tail probability of detection with the threshold of alarms, or the nats of an anomaly head;
- the probabilities of classification heads and of labels.

Alarms are shaded, with what was most unusual when they opened; labels are a bar below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
from matplotlib import rc_context
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.detection.vus import runs
from models.errors import DataError
from models.events.schema import NumericField
from models.spec.detection import ALARM_STATES
from models.spec.heads import (
    LOG_DEVIATION_LIMIT,
    ClassificationHead,
    ForecastHead,
    Head,
    LabelHead,
    nats_output,
    scores_events,
)
from models.spec.layout import (
    anomaly_width,
    detection_of,
    event_field,
    network_outputs,
    output_spec,
)
from models.spec.model import ModelSpec, schema_of
from models.training.baselines import in_units
from models.training.data import (
    Streams,
    moment_ms,
    moment_text,
    split_of,
    streams_of,
    unresolved_training_of,
)
from models.training.evaluate import (
    anomalous_events,
    causes_of_alarms,
    detect,
    run_chunks,
    run_network,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

FORMATS: Final = ("svg", "png", "pdf")
MAX_FIELDS: Final = 6
SMALLEST_PROBABILITY: Final = 1e-12
NORMAL_95: Final = 1.96
MODEL, BAND, ALARM, LABEL = "tab:blue", "tab:blue", "tab:red", "tab:green"


class _Forecast(NamedTuple):
    """The forecast of each event, made before it; NaN where there is none."""

    middle: Floats
    low: Floats
    high: Floats
    label: str


NO_CAUSES: Final[Mapping[int, str]] = MappingProxyType({})


class _Run(NamedTuple):
    """A model's outputs by name, the forecasts by field, and the causes of alarms by the row of the
    event that opened them."""

    outputs: Mapping[str, NDArray[np.float32]]
    forecasts: dict[str, _Forecast]
    causes: Mapping[int, str] = NO_CAUSES


def plot_streams(
    artifact: Artifact,
    frame: pl.DataFrame,
    names: Sequence[str],
    *,
    kind: str = "svg",
    since: str | None = None,
    held_out: bool = False,
    until: str | None = None,
    anomalies: str | None = None,
    source: str = "data",
) -> Iterator[bytes]:
    """The plots of streams of a table, each as a file of one of `FORMATS`.

    Args:
        artifact: a model with `events` and `training`, which names the stream's column.
        frame: one row per event, of these streams and possibly of others.
        names: the streams.
        since, until: RFC 3339 moments between which events are shown; earlier ones move the state.
        held_out: without `since`, show the events of the test set.
        anomalies: boolean column that labels anomalous events.
        source: what errors call the table.

    Raises:
        DataError: there are no such events.
    """
    if not names:
        return
    spec = artifact.spec
    schema, column = schema_of(spec), unresolved_training_of(spec).stream
    if column not in frame.columns:
        raise DataError(
            field=column, expected=f"{source}: a column of that name", got=f"{frame.columns}"
        )
    chosen = frame.filter(pl.col(column).cast(pl.String).is_in(names))
    for name in set(names) - set(chosen[column].cast(pl.String)):
        some = frame[column].unique().sort().head(3).to_list()
        raise DataError(
            field=column, expected=f"{source}: events of stream {name!r}", got=f"{some}, ..."
        )
    streams = streams_of(spec, chosen, source)
    shown = np.ones(streams.events, np.bool_)
    if since is not None:
        shown &= streams.moments_ms >= moment_ms(schema, since, "--since")
    elif held_out:
        shown &= streams.split_keys >= split_of(spec).test
    if until is not None:
        shown &= streams.moments_ms < moment_ms(schema, until, "--until")
    labels = None if anomalies is None else anomalous_events(spec, streams, anomalies, source)
    spans = dict(zip(streams.names, streams.spans, strict=True))
    for name in names:
        if not shown[slice(*spans[name])].any():
            moments = streams.moments_ms[slice(*spans[name])]
            first, last = (moment_text(schema, each) for each in np.sort(moments)[[0, -1]])
            raise DataError(
                expected=f"{source}: events of {name!r} in that time",
                got=f"none; the stream has events from {first} to {last}",
            )
    run = _run(artifact, streams)
    for name in names:
        own = np.zeros(streams.events, np.bool_)
        own[slice(*spans[name])] = True
        figure = _figure(spec, streams, name, run, shown & own, labels)
        buffer = BytesIO()
        # equal arguments give equal files
        with rc_context({"svg.hashsalt": spec.name, "svg.fonttype": "none"}):
            dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
            figure.savefig(buffer, format=kind, metadata=dated.get(kind))
        yield buffer.getvalue()


def _run(artifact: Artifact, streams: Streams) -> _Run:
    spec = artifact.spec
    if spec.detection is None:
        by_name = output_spec(spec).by_name(run_chunks(artifact, streams))
        return _Run(by_name, _forecasts(spec, streams, by_name))
    network = run_network(spec, artifact.weights, streams)
    by_name = output_spec(spec).by_name(detect(spec, streams, network))
    forecasts = _anomaly_forecasts(spec, streams, network)
    opened = by_name[f"{spec.detection.head}.alarm"] == ALARM_STATES.index("opened")
    causes = causes_of_alarms(spec, streams, network, np.flatnonzero(opened).tolist())
    return _Run(by_name, forecasts | _forecasts(spec, streams, by_name), causes)


def _figure(
    spec: ModelSpec,
    streams: Streams,
    stream: str,
    run: _Run,
    shown: NDArray[np.bool_],
    labels: NDArray[np.bool_] | None,
) -> Figure:
    by_name, forecasts, causes = run
    numeric = [field.name for field in schema_of(spec).fields if isinstance(field, NumericField)]
    fields = [name for name in numeric if name in forecasts] or numeric
    # a stream may never have some of them
    had = [name for name in fields if streams.columns.present[name][shown].any()]
    fields = (had or fields)[:MAX_FIELDS]
    scores = [head for head in spec.heads if scores_events(head)]
    classes = [
        head
        for head in spec.heads
        if isinstance(head, (ClassificationHead, LabelHead)) and head not in scores
    ]
    count = len(fields) + len(scores) + len(classes)
    figure = Figure(figsize=(10, 0.6 + 1.9 * count), layout="constrained")
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0].tolist()
    zone = ZoneInfo(schema_of(spec).timezone)
    times = streams.moments_ms[shown].astype("datetime64[ms]")
    rest = iter(panels)
    for name in fields:
        values = np.where(
            streams.columns.present[name], streams.columns.values[name], np.nan
        ).astype(np.float64)
        _draw_values(next(rest), name, times, values[shown], forecasts.get(name), shown)
    for head in scores:
        _draw_score(next(rest), spec, head, times, by_name, shown, causes)
    for each in classes:
        _draw_classes(next(rest), each.name, times, by_name[each.name][shown])
    alarmed = np.zeros(len(times), np.bool_)
    if spec.detection is not None:
        alarmed = by_name[f"{spec.detection.head}.alarm"][shown] > 0
    for axes in panels:
        _shade(axes, times, alarmed, ALARM, "alarm", 0.0, 1.0)
        if labels is not None:
            _shade(axes, times, labels[shown], LABEL, "labelled", 0.0, 0.06)
    locator = AutoDateLocator(tz=zone)
    panels[-1].xaxis.set_major_locator(locator)
    panels[-1].xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=zone))
    panels[0].set_title(f"{spec.name}: {stream}", fontsize="medium")
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        handles=list(entries.values()),
        labels=list(entries),
        loc="outside lower center",
        ncols=6,
        fontsize="small",
        frameon=False,
    )
    return figure


def _anomaly_forecasts(
    spec: ModelSpec, streams: Streams, network: NDArray[np.float32]
) -> dict[str, _Forecast]:
    """Mean and 95% interval of each numeric target of detection's head."""
    _, head, _ = detection_of(spec)
    forecasts = {}
    start = network_outputs(spec).slices[head.name].stop
    for name in head.targets:
        field = event_field(spec, name)
        if isinstance(field, NumericField):
            mean, log_deviation = network[:, start : start + 2].astype(np.float64).T
            limited = np.clip(log_deviation, -LOG_DEVIATION_LIMIT, LOG_DEVIATION_LIMIT)
            reach = NORMAL_95 * np.exp(limited)
            encoded = np.stack([mean, mean - reach, mean + reach])
            middle, low, high = in_units(spec, name, by_field(spec, streams, field, encoded))
            forecasts[name] = _Forecast(middle, low, high, "95% interval")
        start += anomaly_width(field)
    return forecasts


def by_field(spec: ModelSpec, streams: Streams, field: NumericField, values: Floats) -> Floats:
    """Encoded values [..., rows] of a field, standardised by the field's own mean and deviation
    instead of those of the stream before each event."""
    if field.normalisation is None or field.mean is None or field.std is None:
        return values
    schema = schema_of(spec)
    rows, columns = streams.encoded(schema), schema.column_index
    before = []
    for part, first in (("mean", field.mean), ("std", field.std)):
        after = rows[:, columns[f"{field.name}.{part}"]].astype(np.float64)
        own = np.append(first, after[:-1])
        own[[start for start, _ in streams.sessions]] = first
        before.append(own)
    return np.asarray((values * before[1] + before[0] - field.mean) / field.std)


def _forecasts(
    spec: ModelSpec, streams: Streams, outputs: Mapping[str, NDArray[np.float32]]
) -> dict[str, _Forecast]:
    """Median and outer quantiles of each target of forecast heads, moved to the event that they
    forecast."""
    forecasts = {}
    for head in spec.heads:
        if not isinstance(head, ForecastHead):
            continue
        values = (
            outputs[head.name].astype(np.float64).reshape(streams.events, len(head.targets), -1)
        )
        before = np.full(values.shape, np.nan)
        for start, stop in streams.sessions:
            before[start + 1 : stop] = values[start : stop - 1]
        ends = f" to {head.quantiles[-1]:g}" if len(head.quantiles) > 1 else ""
        label = f"quantiles {head.quantiles[0]:g}{ends}" if head.quantiles else "forecast"
        for at, name in enumerate(head.targets):
            own = before[:, at]
            forecasts[name] = _Forecast(own[:, own.shape[1] // 2], own[:, 0], own[:, -1], label)
    return forecasts


def _draw_values(
    axes: Axes,
    name: str,
    times: NDArray[Any],
    values: Floats,
    forecast: _Forecast | None,
    shown: NDArray[np.bool_],
) -> None:
    if forecast is not None:
        low, high = forecast.low[shown], forecast.high[shown]
        axes.fill_between(times, low, high, color=BAND, alpha=0.25, lw=0, label=forecast.label)
        axes.plot(times, forecast.middle[shown], color=MODEL, lw=0.8, label="predicted")
        # a new stream's first intervals may be wide
        limits = np.concatenate([values, forecast.middle[shown]])
        limits = limits[np.isfinite(limits)]
        if len(limits):
            margin = 0.1 * max(float(np.ptp(limits)), 1e-9)
            axes.set_ylim(float(limits.min()) - 2 * margin, float(limits.max()) + 3 * margin)
    axes.plot(times, values, color="black", lw=0.8, label=name)
    axes.set_ylabel(name)


def _draw_score(
    axes: Axes,
    spec: ModelSpec,
    head: Head,
    times: NDArray[Any],
    outputs: Mapping[str, NDArray[np.float32]],
    shown: NDArray[np.bool_],
    causes: Mapping[int, str],
) -> None:
    detection = spec.detection
    if detection is None or detection.head != head.name or detection.fit is None:
        name = nats_output(head)
        axes.plot(times, outputs[name][shown], color="black", lw=0.8)
        axes.set_ylabel(f"{name}, nats")
        return
    probability = outputs[f"{head.name}.probability"][shown]
    axes.plot(times, np.maximum(probability, SMALLEST_PROBABILITY), color="black", lw=0.8)
    threshold = detection.fit.threshold(detection.alarm.false_alarms_per_day)
    axes.axhline(threshold, color=ALARM, lw=0.8, ls="--", label="threshold")
    axes.set_yscale("log")
    axes.set_ylim(2.0, SMALLEST_PROBABILITY)
    axes.set_ylabel("tail probability")
    places = np.flatnonzero(shown)
    line, before = 0, times[0] - np.ptp(times)
    for at in range(len(places)):
        if (words := causes.get(int(places[at]))) is None:
            continue
        # names of alarms that opened shortly after another would overlap
        line = (line + 1) % 4 if times[at] - before < np.ptp(times) / 4 else 0
        before = times[at]
        axes.annotate(
            words,
            (times[at], SMALLEST_PROBABILITY),
            xytext=(2, -8 - 8 * line),
            textcoords="offset points",
            fontsize="x-small",
            color=ALARM,
        )


def _draw_classes(
    axes: Axes, name: str, times: NDArray[Any], probabilities: NDArray[np.float32]
) -> None:
    for at, column in enumerate(probabilities.reshape(len(times), -1).T[:8]):
        axes.plot(times, column, lw=0.8, label=f"{name} {at}" if probabilities.ndim > 1 else None)
    axes.set(ylabel=name, ylim=(-0.05, 1.05))


def _shade(
    axes: Axes,
    times: NDArray[Any],
    where: NDArray[np.bool_],
    color: str,
    label: str,
    bottom: float,
    top: float,
) -> None:
    """Shade runs of events, each up to the event after it."""
    for number, (start, stop) in enumerate(runs(where)):
        end = times[min(stop, len(times) - 1)]
        axes.axvspan(
            times[start],
            end,
            bottom,
            top,
            color=color,
            alpha=0.2 if top == 1.0 else 0.8,
            lw=0.5,
            label=label if number == 0 else None,
        )
