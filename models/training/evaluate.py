"""Scores an artifact as the service runs it: chunk by chunk, with the state of each stream.

Every stream starts in the zero state with its clock at zero, and again wherever the model resets
states by itself; its events come in chunks of random lengths (those of training, for a network that
looks at a chunk as a whole); each chunk runs from the state that the one before it left, in batches
with other streams, padded and masked. What is scored are the outputs of these steps.

A network that takes whole sequences gets every stream as one. One in blocks goes from block to
block, each with its lookahead and no more, and the last one ends where the stream ends, as after a
`final` chunk: what its outputs are does not depend on chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import polars as pl
from numpy.typing import NDArray
from typing_extensions import TypedDict

from models.artifact.artifact import Artifact
from models.decoding.losses import Scored, has_targets
from models.detection.causes import Causes
from models.detection.detector import Detector
from models.errors import DataError
from models.offline.batches import Advance, Sequences, run_rows
from models.offline.steps import Step, open_step
from models.spec.blocks import BlockSpec, cut_blocks
from models.spec.heads import Head, LabelHead
from models.spec.layout import (
    detection_of,
    detection_state,
    network_outputs,
    network_state,
    output_spec,
    state_spec,
)
from models.spec.model import ModelSpec, schema_of
from models.training.data import Streams, moment_ms, split_of, streams_of, training_of
from models.training.labels import Labels, labels_of, read_truth
from models.training.scores import add_scaled, score_outputs, stream_scales, values_of

DETECTION_STEPS = 256
MS_PER_DAY = 86_400_000


class Cuts(TypedDict, total=False):
    """How streams are cut and batched.

    Attributes:
        chunk: maximum events of a chunk, 64 by default; lengths are drawn uniformly from 1 to it. A
            network that depends on the chunk gets the windows of its training, one that takes whole
            sequences gets whole streams, and one in blocks its own windows.
        seed: of the lengths, 0 by default.
        batch: most streams in a batch, 64 by default.
        advance: called with the number of events done, after every batch.
    """

    chunk: int
    seed: int
    batch: int
    advance: Advance


def run_chunks(artifact: Artifact, streams: Streams, **cuts: Unpack[Cuts]) -> NDArray[np.float32]:
    """Run every stream of a model from its beginning in chunks.

    Returns:
        Packed outputs, float32 [rows, O], as `models.spec.layout.output_spec` says.

    Raises:
        DataError: a stream is longer than a sequence that the network takes as a whole.
    """
    outputs = run_network(artifact.spec, artifact.weights, streams, **cuts)
    return outputs if artifact.spec.detection is None else detect(artifact.spec, streams, outputs)


def detect(spec: ModelSpec, streams: Streams, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """The outputs of a fitted detection, from those of the network."""
    return detect_rows(spec, streams.sessions, streams.encoded(schema_of(spec)), outputs)


def detect_rows(
    spec: ModelSpec,
    sessions: Iterable[tuple[int, int]],
    rows: NDArray[np.float32],
    outputs: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The outputs of a fitted detection for encoded rows, from those of the network."""
    detector = Detector(spec)
    found = np.zeros((len(outputs), output_spec(spec).size), np.float32)
    for start, stop in sessions:
        state = detection_state(spec).zero().floats[np.newaxis]
        for at in range(start, stop, DETECTION_STEPS):
            part = slice(at, min(at + DETECTION_STEPS, stop))
            length = np.array([part.stop - at])
            scored, state = detector.step(
                rows[np.newaxis, part], length, outputs[np.newaxis, part], state
            )
            found[part] = scored[0]
    return found


def causes_of_alarms(
    spec: ModelSpec, streams: Streams, outputs: NDArray[np.float32], opened: Sequence[int]
) -> dict[int, str]:
    """The causes of alarms in words, by the row of the event that opened them; none of alarms
    without a record (`close_above`).

    Args:
        outputs: the network's.
        opened: ascending rows.
    """
    detector, causes = Detector(spec), Causes(spec)
    rows, parts = streams.encoded(schema_of(spec)), detection_state(spec).slices
    complete, words = state_spec(spec), {}
    for start, stop in streams.sessions:
        state, at = detection_state(spec).zero().floats[np.newaxis], start
        for event in (row for row in opened if start <= row < stop):
            part = slice(at, event + 1)
            length = np.array([part.stop - at])
            _, state = detector.step(
                rows[np.newaxis, part], length, outputs[np.newaxis, part], state
            )
            floats, at = complete.zero().floats, part.stop
            for name, columns in parts.items():
                floats[complete.slices[name]] = state[0, columns]
            if (alarm := causes.of_state(floats)) is not None:
                words[event] = alarm.cause.words
    return words


def run_network(
    spec: ModelSpec,
    weights: Mapping[str, NDArray[np.float32]],
    streams: Streams,
    step: Step | None = None,
    **cuts: Unpack[Cuts],
) -> NDArray[np.float32]:
    """The network's outputs alone, as `models.spec.layout.network_outputs` says.

    Args:
        step: of the network; opened if none is given.
    """
    step = step or open_step(spec, weights)
    batch, advance = cuts.get("batch", 64), cuts.get("advance")
    if spec.blocks is not None:
        return _run_blocks(spec, spec.blocks, step, streams, batch, advance)
    fixed = _fixed_steps(spec, streams)
    sequences = Sequences.of_spans(streams.encoded(schema_of(spec)), streams.sessions)
    states = np.zeros((len(streams.sessions), network_state(spec).float_size), np.float32)
    width = network_outputs(spec).size
    packed, _ = run_rows(
        step,
        sequences,
        states,
        width,
        chunk=fixed or cuts.get("chunk", 64),
        random=None if fixed else np.random.default_rng(cuts.get("seed", 0)),
        batch=batch,
        advance=advance,
    )
    outputs = np.zeros((streams.events, width), np.float32)
    outputs[sequences.indexes()] = packed
    return outputs


def _fixed_steps(spec: ModelSpec, streams: Streams) -> int | None:
    """How many steps a chunk must have; None if any number will do."""
    if spec.chunking == "invisible":
        return None
    if spec.chunking == "per_chunk":
        return training_of(spec).window_steps
    for start, stop in streams.sessions:
        if spec.chunk_limit is not None and stop - start > spec.chunk_limit:
            raise DataError(
                expected=f"streams of at most `max_chunk_steps` ({spec.chunk_limit}) events, since "
                "the network takes each as a whole",
                got=f"{stop - start} of {streams.name_of(start)!r}",
            )
    return spec.chunk_limit


def _run_blocks(
    spec: ModelSpec,
    blocks: BlockSpec,
    step: Step,
    streams: Streams,
    batch: int,
    advance: Advance | None,
) -> NDArray[np.float32]:
    """Run every stream block by block, as a service that knows their ends."""
    rows = streams.encoded(schema_of(spec))
    outputs = np.zeros((streams.events, network_outputs(spec).size), np.float32)
    longest_first = sorted(streams.spans, key=lambda span: span[0] - span[1])
    batch_size = min(batch, len(longest_first))
    for first in range(0, len(longest_first), batch_size):
        group = longest_first[first : first + batch_size]
        windows = [
            cut_blocks(blocks, rows[start:stop], final=True).windows for start, stop in group
        ]
        state = np.zeros((batch_size, network_state(spec).float_size), np.float32)
        for number in range(len(windows[0])):
            padded = np.zeros((batch_size, blocks.window, rows.shape[1]), np.float32)
            lengths = np.zeros(batch_size, np.int32)
            for slot, own in enumerate(windows):
                if number < len(own):
                    lengths[slot] = len(own[number])
                    padded[slot, : lengths[slot]] = own[number]
            values, state = step(padded, lengths, state)
            scored = np.minimum(lengths, blocks.size)
            for slot, (start, _) in enumerate(group):
                at = start + number * blocks.size
                outputs[at : at + scored[slot]] = values[slot, : scored[slot]]
            if advance is not None:
                advance(int(scored.sum()))
    return outputs


def chunk_settings(spec: ModelSpec, cuts: Cuts) -> dict[str, Any]:
    """How `run_chunks` split the streams, as plain data: `blocks`, or `chunk` and `seed`."""
    if spec.blocks is not None:
        return {"blocks": spec.blocks.model_dump()}
    return {"chunk": cuts.get("chunk", 64), "seed": cuts.get("seed", 0)}


def scored_rows(
    streams: Streams, from_key: int | None, to_key: int | None = None
) -> NDArray[np.int64]:
    """The events from one key of the split to before another that have a predecessor, int64 [n]."""
    followed = np.append(False, streams.has_next[:-1])
    return _within(streams, followed, from_key, to_key)


def target_rows(
    head: Head, streams: Streams, labels: Labels, from_key: int | None, to_key: int | None = None
) -> NDArray[np.int64]:
    """The events with keys in [from_key, to_key) that a head predicts or labels, int64 [n].

    Those with a label, for a label head; those with a predecessor for any other.
    """
    if not isinstance(head, LabelHead):
        return scored_rows(streams, from_key, to_key)
    return _within(streams, ~np.isnan(labels[head.name]), from_key, to_key)


def _within(
    streams: Streams, candidates: NDArray[np.bool_], from_key: int | None, to_key: int | None
) -> NDArray[np.int64]:
    """The candidate rows with keys in [from_key, to_key)."""
    selected = candidates.copy()
    if from_key is not None:
        selected &= streams.split_keys >= from_key
    if to_key is not None:
        selected &= streams.split_keys < to_key
    return np.flatnonzero(selected)


def evaluate(
    artifact: Artifact,
    frame: pl.DataFrame,
    *,
    since: str | None = None,
    held_out: bool = False,
    anomalies: str | None = None,
    source: str = "data",
    **cuts: Unpack[Cuts],
) -> dict[str, Any]:
    """Run the artifact over a table and score each head that has targets.

    Args:
        artifact: a model with `events` and `training` (which names the stream's column).
        frame: one row per event, as `read_data` gives it.
        since: RFC 3339 moment from which events are scored; earlier ones only move the
            states. All events by default.
        held_out: without `since`, score the events of the test set, which the artifact's split
            determines; earlier ones only move the states.
        anomalies: boolean column that labels anomalous events, to score the alarms of a model with
            detection against.
        source: what errors call the table.

    Returns:
        `events`, `streams`, `scored` (events), `since`, the members of `chunk_settings`, and
        `heads`: by head, its metrics; for a model with a decoder also `decoder`, as from
        `horizon_report`, with the points of the baselines alone; with anomalies what
        `detection_report` gives; `burn_in`, as from `measure_burn_in`.

    Raises:
        SpecError, DataError: the model has nothing to score, or the table does not fit it.
    """
    spec = artifact.spec
    streams = as_split = streams_of(spec, frame, source)
    from_key = None
    if since is not None:
        streams, from_key = streams.by_moment(), moment_ms(schema_of(spec), since, "--since")
    elif held_out:
        from_key = split_of(spec).test
    labelled = None if anomalies is None else anomalous_events(spec, streams, anomalies, source)
    labels = labels_of(spec, streams.frame, source, streams.table_rows)
    scored = events_to_score(spec, streams, labels, from_key)
    if scored == 0:
        range_ = f" from {since} on" if since else ""
        if held_out:
            range_ = f" {split_of(spec).test_range}"
        raise DataError(
            expected=f"{source}: events to score{range_}, each after another of its stream or "
            "labelled",
            got="none",
        )
    outputs = run_chunks(artifact, streams, **cuts)
    decoded: dict[str, Any] = {}
    if labelled is not None:
        from models.training.alarm_report import detection_report

        by_name, seed = output_spec(spec).by_name(outputs), cuts.get("seed", 0)
        is_scored = np.ones(streams.events, np.bool_)
        if from_key is not None:
            is_scored = streams.split_keys >= from_key
        decoded |= detection_report(spec, as_split, by_name, is_scored, labelled, seed=seed)
    if spec.decoder is not None:
        from models.training.horizon import horizon_report

        rows = streams.encoded(schema_of(spec))
        decoded["decoder"] = horizon_report(artifact, streams, rows, from_key)
    from models.training.burn_in import measure_burn_in

    burn_in = measure_burn_in(artifact, streams, outputs)
    return {
        "events": streams.events,
        "streams": len(streams.names),
        "scored": scored,
        "since": since,
        **chunk_settings(spec, cuts),
        "heads": head_metrics(spec, outputs, streams, labels, from_key),
        **decoded,
        **({} if burn_in is None else {"burn_in": burn_in}),
    }


def anomalous_events(
    spec: ModelSpec, streams: Streams, column: str, source: str = "data"
) -> NDArray[np.bool_]:
    """The labels of anomalous events, bool [rows]; an empty cell is false.

    Raises:
        SpecError: the model has no detection.
        DataError: there is no such column, or a cell is neither empty nor true, false, 1 or 0.
    """
    detection_of(spec)
    if column not in streams.frame.columns:
        raise DataError(
            field=column,
            expected=f"{source}: a column of the labels of anomalies",
            got=f"{streams.frame.columns}",
        )
    return np.equal(read_truth(streams.frame[column], source, streams.table_rows), 1)


def events_to_score(spec: ModelSpec, streams: Streams, labels: Labels, from_key: int | None) -> int:
    """The number of events from a moment on that a head or the decoder predicts or labels."""
    rows = [
        target_rows(head, streams, labels, from_key) for head in spec.heads if has_targets(head)
    ]
    if spec.decoder is not None:
        rows.append(scored_rows(streams, from_key))
    return distinct_rows(rows)


def distinct_rows(rows: Iterable[NDArray[np.int64]]) -> int:
    """The number of events that one head or more predict or label."""
    return len(set().union(*(at.tolist() for at in rows)))


def head_metrics(
    spec: ModelSpec,
    outputs: NDArray[np.float32],
    streams: Streams,
    labels: Labels,
    from_key: int | None,
) -> dict[str, dict[str, float]]:
    """`Scored.means` of every head that has a target from a moment on."""
    scored = score_heads(spec, outputs, streams, labels, from_key)
    return {name: each.means() for name, (each, _) in scored.items()}


def score_heads(
    spec: ModelSpec,
    outputs: NDArray[np.float32],
    streams: Streams,
    labels: Labels,
    from_key: int | None,
) -> dict[str, tuple[Scored, NDArray[np.int64]]]:
    """The losses of every head that has a target from a moment on, and the rows they are of."""
    outputs_by_head = output_spec(spec).by_name(outputs)
    scales = stream_scales(spec, streams)
    found: dict[str, tuple[Scored, NDArray[np.int64]]] = {}
    for head in spec.heads:
        if not has_targets(head):
            continue
        at = target_rows(head, streams, labels, from_key)
        output = values_of(head, outputs_by_head)
        scored = score_outputs(spec, head, output, streams.columns, labels, at, scales)
        scored = add_scaled(spec, head, scored, scales, at)
        if scored.has_losses:
            found[head.name] = scored, at
    return found
