"""Burn-in: after how many events a state no longer depends on where it was started.

A new version of a model has no states. Run over a stream's last N events from its initial state, it
is as good as if it had seen all of them, if N is the burn-in (Kapturowski et al. 2019, who call
those events the burn-in of a recurrent replay).

It is measured: from many places of the streams on, the outputs of a run that begins there in the
initial state are compared with those of the run that has seen the stream from its first event. The
difference of an output is below its tolerance after the last event that exceeds it. A window that
exceeds it among its last tenth has not settled; if more than a hundredth have not, the model does
not forget within these windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.events.schema import NumericField
from models.offline.batches import Sequences, run_rows
from models.offline.steps import open_step
from models.spec.heads import ClassificationHead, LabelHead
from models.spec.layout import Output, output_spec
from models.spec.model import ModelSpec
from models.training.data import Streams, training_of
from models.training.evaluate import run_chunks
from models.training.horizon import table_lines

WINDOWS: Final = 128
LONGEST_EVENTS: Final = 2048
"""Fewest windows that are compared, if the streams are long enough, and events of the longest."""

SHORTEST_EVENTS: Final = 16
"""Shorter windows are not compared."""

TOLERANCE: Final = 0.01
"""Of a probability; of any other output as a share of its standard deviation."""

QUANTILES: Final = (0.5, 0.9, 0.99)
"""Over windows. The last one is the burn-in."""

POINTS: Final = 60
"""At which the curves of a plot are kept."""

Unit = Literal["probability", "deviation", "deviation in the stream"]
"""Streams whose targets are normalised by themselves have outputs of any size."""

Span = tuple[int, int]
Floats = NDArray[np.float32]
Run = Callable[[Sequence[Span]], Floats]
"""Outputs [rows, O] of some windows one after another, each from the initial state."""


def measure_burn_in(
    artifact: Artifact, streams: Streams, outputs: Floats, before_key: int | None = None
) -> dict[str, Any] | None:
    """Measure the burn-in of a model with events.

    Args:
        outputs: of the same streams, as `run_chunks` gives them.
        before_key: only events before this key of the split are used.

    Returns:
        `events` (None if the model does not forget), `windows`, `longest_events`, by output
        `tolerance`, `relative_to` and `events` by quantile (None: not reached), and `curves`, the
        differences by events; None if no state is carried, or no stream is long enough.
    """

    def run(windows: Sequence[Span]) -> Floats:
        return run_chunks(artifact, streams.windows(windows), chunk=LONGEST_EVENTS)

    return _measure(artifact.spec, spans_before(streams, before_key), outputs, run)


def measure_rows_burn_in(artifact: Artifact, sequences: Sequence[Floats]) -> dict[str, Any] | None:
    """Measure the burn-in of a model that takes rows, float32 [T, F] of each stream."""
    spec = artifact.spec
    step = open_step(spec, artifact.weights, artifact.network)
    initial = artifact.network_state.pack(artifact.state.initial())
    rows = np.concatenate(sequences)

    def run(windows: Sequence[Span]) -> Floats:
        states = np.tile(initial, (len(windows), 1))
        cut = Sequences.of_spans(rows, windows)
        outputs, _ = run_rows(step, cut, states, artifact.outputs.size, chunk=_chunk(spec))
        return outputs

    ends = np.cumsum([len(part) for part in sequences]).tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    return _measure(spec, spans, run(spans), run)


def spans_before(streams: Streams, key: int | None) -> list[Span]:
    """The rows of each stream before a key of the split; all of them if there is none."""
    if key is None:
        return list(streams.spans)
    return [
        (start, start + int(np.searchsorted(streams.split_keys[start:stop], key)))
        for start, stop in streams.spans
    ]


def _measure(
    spec: ModelSpec, spans: Sequence[Span], outputs: Floats, run: Run
) -> dict[str, Any] | None:
    # to a network in blocks, the end of a window is the end of a stream
    ahead = 0 if spec.blocks is None else spec.blocks.lookahead
    windows = [] if spec.chunking == "whole" else _windows(spans, _grid(spec))
    windows = [each for each in windows if each[1] - each[0] >= SHORTEST_EVENTS + ahead]
    if not windows:
        return None
    lengths = [stop - start - ahead for start, stop in windows]
    begins = np.cumsum([0, *(stop - start for start, stop in windows[:-1])]).tolist()
    from_initial = run(windows)
    longest = max(lengths)
    points = np.unique(np.geomspace(1, longest, POINTS).round().astype(np.int64))
    by_output: dict[str, dict[str, Any]] = {}
    curves: dict[str, Any] = {}
    for output in output_spec(spec).outputs:
        if output.categories_of:
            continue  # the next most probable category has another code at any distance
        columns = output_spec(spec).slices[output.name]
        unit = _unit(spec, output)
        windowed, true = (
            [values[at : at + length, columns] for at, length in zip(at, lengths, strict=True)]
            for values, at in ((from_initial, begins), (outputs, [start for start, _ in windows]))
        )
        parts = [
            (np.abs(of_window - of_true) / scale).max(axis=1)
            for of_window, of_true, scale in zip(windowed, true, _scales(unit, true), strict=True)
        ]
        by_output[output.name] = {
            "tolerance": TOLERANCE,
            "relative_to": unit,
            "events": _quantiles(np.array([_settled_after(part) for part in parts])),
        }
        curves[output.name] = _curves(parts, points)
    reached = [each["events"][str(QUANTILES[-1])] for each in by_output.values()]
    return {
        "events": None if None in reached else max(1, *reached),
        "windows": len(windows),
        "longest_events": longest,
        "outputs": by_output,
        "curves": {"events": points.tolist(), "outputs": curves},
    }


def _grid(spec: ModelSpec) -> int:
    """Events between the places at which a run may begin with the same cuts as the whole one."""
    if spec.blocks is not None:
        return spec.blocks.size
    if spec.chunking == "per_chunk" and spec.training is not None:
        return training_of(spec).window_steps
    return _chunk(spec) if spec.chunking == "per_chunk" else 1


def _chunk(spec: ModelSpec) -> int:
    """Events of a call, unless `run_chunks` chooses them."""
    return spec.chunk_limit or LONGEST_EVENTS


def _windows(spans: Sequence[Span], grid: int) -> list[Span]:
    """Windows that begin after the first quarter of the longest streams."""
    rooms = [3 * (stop - start) // 4 for start, stop in spans]
    longest = min(LONGEST_EVENTS, max(rooms))
    chosen = [span for span, room in zip(spans, rooms, strict=True) if 2 * room >= longest]
    picked = np.linspace(0, len(chosen) - 1, min(WINDOWS, len(chosen))).astype(int)
    each = -(-WINDOWS // len(picked))
    windows = []
    for start, stop in [chosen[at] for at in picked]:
        events = stop - start
        last = max(3 * events // 8, events - LONGEST_EVENTS)
        offsets = np.linspace(events // 4, last, each).astype(int) // grid * grid
        begins = np.unique(offsets) + start
        windows += [(at, min(at + LONGEST_EVENTS, stop)) for at in begins.tolist()]
    return windows


def _unit(spec: ModelSpec, output: Output) -> Unit:
    """What an output's tolerance is a share of."""
    if output.name.endswith((".probability", ".alarm")):
        return "probability"
    head = next((each for each in spec.heads if each.name == output.name), None)
    if isinstance(head, ClassificationHead | LabelHead):
        return "probability"
    targets = getattr(head, "targets", ())
    fields = () if spec.events is None else spec.events.fields
    is_own = any(
        isinstance(field, NumericField) and field.normalisation and field.name in targets
        for field in fields
    )
    return "deviation in the stream" if is_own else "deviation"


def _scales(unit: Unit, true: Sequence[Floats]) -> list[NDArray[np.float64]]:
    """What the differences of each window's outputs are divided by."""
    if unit == "probability":
        return [np.ones(1)] * len(true)
    of_all = true if unit == "deviation in the stream" else [np.concatenate(true)]
    scales = [np.std(each, axis=0, dtype=np.float64) for each in of_all]
    return [np.where(each > 0, each, 1) for each in scales] * (len(true) // len(scales))


def _settled_after(difference: NDArray[np.float64]) -> float:
    """Events until a window's difference [T] stays below the tolerance; infinite if it does not."""
    above = np.flatnonzero(difference > TOLERANCE)
    events = above[-1] + 1 if len(above) else 0
    return float(events) if events <= 0.9 * len(difference) else np.inf


def _quantiles(events: NDArray[np.float64]) -> dict[str, int | None]:
    values = np.quantile(events, QUANTILES, method="higher").tolist()
    return {
        str(quantile): None if np.isinf(value) else int(value)
        for quantile, value in zip(QUANTILES, values, strict=True)
    }


def _curves(
    parts: Sequence[NDArray[np.float64]], points: NDArray[np.int64]
) -> dict[str, list[float]]:
    """The quantiles of the difference after each number of events, over windows of that length."""
    quantiles = [
        np.quantile([part[at - 1] for part in parts if len(part) >= at], QUANTILES)
        for at in points.tolist()
    ]
    columns = np.transpose(quantiles).round(6).tolist()
    return {str(quantile): column for quantile, column in zip(QUANTILES, columns, strict=True)}


def burn_in_lines(measured: dict[str, Any]) -> list[str]:
    """A measured burn-in as a sentence and a table."""
    events, longest = measured["events"], measured["longest_events"]
    where = f"{measured['windows']} windows of up to {longest:,} events"
    if events is None:
        line = (
            f"burn-in: the model does not forget within {longest:,} events ({where}): a new "
            "version continues its streams only from their first event, or from a backfill"
        )
    else:
        line = (
            f"burn-in: {events:,} events ({where}); with `history: {{events: {events}}}` a new "
            "version continues its streams"
        )
    rows = {
        f"{name}: {each['tolerance']:g} of its {each['relative_to']}": [
            "not reached" if value is None else f"{value:,}" for value in each["events"].values()
        ]
        for name, each in measured["outputs"].items()
    }
    shares = [f"{quantile:.0%} of windows" for quantile in QUANTILES]
    return [line, *table_lines("events until the difference stays below", shares, rows)]
