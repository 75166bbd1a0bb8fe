"""The heads of a network: raw values, outputs, training losses.

The raw values [B, T, U] of a head are what its weights compute at every step: predictions of the
next event. Two functions use them, both TensorFlow ops without a loop:

- `head_output`: the output of the step, packed [B, T, size] as `models.spec.layout.output_spec`
  says. An anomaly head scores event t under the raw values of t - 1, and the first event of a
  chunk under the state part `<head>.forecast`.
- `head_loss`: the training loss per step against the next event (a label head's against the
  step's own label), and which steps count.

Both read encoded columns (categorical = its code as float32), never raw events. Values beyond a
chunk's length are undefined.

Equations, with y a head's raw values, z an encoded (standardised) value, u = softplus:

    forecast        q_1 = y_1, q_k = q_(k-1) + u(y_k);  output = inverse(q * std + mean), with mean
                    and std of the field or, with `normalisation`, of the stream as of the step
    classification  softmax(y), or sigmoid(y) for a boolean or `value > above`; with `top` the
                    largest k of softmax(y), their codes, and -log softmax(y)[code] of the event
                    under the y before it, in nats
    label           softmax(y), or sigmoid(y) if there are no `classes`
    anomaly         sum over targets of -log p(event), in nats:
                      numeric      log sqrt(2 pi) + s + d^2 / 2,  d = (z - y_1) exp(-s),
                                   s = clip(y_2, -7, 7)
                      categorical  -log softmax(y)[code]
                      boolean      u(y) - z y
                    a numeric or boolean target that is absent adds 0; an absent categorical
                    has a code of its own and is scored like any other.
"""

from __future__ import annotations

from math import log, pi
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from models.errors import SpecError
from models.events.schema import (
    STATISTICS,
    BooleanField,
    CategoricalField,
    EventField,
    EventSchema,
    NumericField,
)
from models.events.values import standardise
from models.networks.layers import activation_of
from models.spec.heads import (
    DEVIATION_LIMIT,
    EXPONENT_LIMIT,
    LOG_DEVIATION_LIMIT,
    AnomalyHead,
    ClassificationHead,
    DenseHead,
    ForecastHead,
    Head,
    LabelHead,
    SequenceHead,
)
from models.spec.layout import anomaly_width, event_field, gives_parameters, target_categories
from models.spec.model import ModelSpec, schema_of

Tensor: TypeAlias = Any
"""A float32 tf.Tensor; TensorFlow ships no types."""


def head_output(spec: ModelSpec, head: Head, raw: Tensor, rows: Tensor, forecast: Tensor) -> Tensor:
    """The head's outputs, packed.

    Args:
        spec: the model, with a fitted schema if it has one.
        head: one of its heads.
        raw: float32 [B, T, U], its raw values.
        rows: float32 [B, T, F], the encoded rows.
        forecast: float32 [B, P], the raw values before the chunk of a head that scores events;
            not read for other heads.

    Returns:
        float32 [B, T, size].
    """
    match head:
        case SequenceHead() | DenseHead():
            return raw
        case ForecastHead():
            return _in_units(spec, head, forecast_standardised(head, raw), rows)
        case ClassificationHead() if head.top is not None:
            return _top_categories(spec, head, raw, rows, forecast)
        case ClassificationHead():
            if isinstance(event_field(spec, head.target), CategoricalField):
                return tf.nn.softmax(raw)
            return tf.sigmoid(raw)
        case LabelHead():
            return tf.nn.softmax(raw) if head.classes else tf.sigmoid(raw)
        case AnomalyHead():
            before = tf.concat([forecast[:, tf.newaxis, :], raw[:, :-1, :]], axis=1)
            loss, _ = anomaly_nats(spec, head, before, rows)
            nats = loss[..., tf.newaxis]
            return tf.concat([nats, before], axis=-1) if gives_parameters(spec, head) else nats


def _top_categories(
    spec: ModelSpec, head: ClassificationHead, raw: Tensor, rows: Tensor, forecast: Tensor
) -> Tensor:
    """Probabilities and codes of the most probable categories, and the surprise of the event."""
    field = target_categories(spec, head)
    logits, codes = tf.math.top_k(raw, min(head.top or 1, field.codes))
    probabilities = tf.exp(logits - tf.reduce_logsumexp(raw, axis=-1, keepdims=True))
    before = tf.concat([forecast[:, tf.newaxis, :], raw[:, :-1, :]], axis=1)
    nats = field_nats(field, before, _value(spec, head.target, rows))[..., tf.newaxis]
    return tf.concat([probabilities, tf.cast(codes, tf.float32), nats], axis=-1)


def last_valid(values: Tensor, lengths: Tensor, before: Tensor) -> Tensor:
    """The state part after the chunk: the values at the last valid step.

    Args:
        values: float32 [B, T, P], raw values or what a head reads.
        lengths: int32 [B]; a row of length 0 keeps its part.
        before: float32 [B, P], the part before the chunk.

    Returns:
        float32 [B, P].
    """
    last = tf.gather(values, tf.maximum(lengths - 1, 0), axis=1, batch_dims=1)
    return tf.where((lengths > 0)[:, tf.newaxis], last, before)


def forecast_standardised(head: ForecastHead, raw: Tensor) -> Tensor:
    """Rising quantiles, or points, of the standardised values: [B, T, targets, quantiles or 1]."""
    shape = (len(head.targets), max(1, len(head.quantiles)))
    values = tf.reshape(raw, tf.concat([tf.shape(raw)[:2], shape], axis=0))
    values = tf.ensure_shape(values, [*raw.shape[:2], *shape])
    if shape[1] == 1:
        return values
    steps = tf.concat([values[..., :1], tf.nn.softplus(values[..., 1:])], axis=-1)
    return tf.cumsum(steps, axis=-1)


def _in_units(spec: ModelSpec, head: ForecastHead, values: Tensor, rows: Tensor) -> Tensor:
    """Undo standardisation and transform: [B, T, targets, k] -> [B, T, targets * k]."""
    columns = []
    for index, name in enumerate(head.targets):
        field = event_field(spec, name)
        if not isinstance(field, NumericField) or field.mean is None or field.std is None:
            raise SpecError(f"head {head.name!r}: expected a fitted numeric field {name!r}")
        mean, std = np.float32(field.mean), np.float32(field.std)
        if field.normalisation is not None:
            mean, std = (_value(spec, f"{name}.{each}", rows)[..., None] for each in STATISTICS)
        value = values[..., index, :] * std + mean
        if field.transform == "signed_log1p":
            value = tf.sign(value) * tf.math.expm1(tf.minimum(tf.abs(value), EXPONENT_LIMIT))
        columns.append(value)
    return tf.concat(columns, axis=-1)


def anomaly_nats(
    spec: ModelSpec, head: AnomalyHead, parameters: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """-log p of each row under the parameters at the same place.

    Args:
        spec: the model.
        head: the anomaly head.
        parameters: float32 [B, T, P], targets side by side in the head's order.
        rows: float32 [B, T, F], the events to score.

    Returns:
        Nats and the number of scored targets, both float32 [B, T].
    """
    nats = tf.zeros(tf.shape(rows)[:2], tf.float32)
    scored = tf.zeros_like(nats)
    start = 0
    for name in head.targets:
        field = event_field(spec, name)
        stop = start + anomaly_width(field)
        present = _present(schema_of(spec), field, rows)
        nats += present * field_nats(field, parameters[..., start:stop], _value(spec, name, rows))
        scored += present
        start = stop
    return nats, scored


def field_nats(field: EventField, parameters: Tensor, value: Tensor) -> Tensor:
    """-log p of a field's encoded values [...] under parameters [..., width]."""
    match field:
        case NumericField():
            log_deviation = tf.clip_by_value(
                parameters[..., 1], -LOG_DEVIATION_LIMIT, LOG_DEVIATION_LIMIT
            )
            deviation = tf.clip_by_value(
                (value - parameters[..., 0]) * tf.exp(-log_deviation),
                -DEVIATION_LIMIT,
                DEVIATION_LIMIT,
            )
            return 0.5 * log(2 * pi) + log_deviation + 0.5 * tf.square(deviation)
        case CategoricalField():
            return tf.nn.sparse_softmax_cross_entropy_with_logits(
                labels=tf.cast(value, tf.int32), logits=parameters
            )
        case BooleanField():
            return tf.nn.sigmoid_cross_entropy_with_logits(labels=value, logits=parameters[..., 0])
        case _:
            raise SpecError(f"field {field.name!r}: {field.kind} cannot be a target")


def head_loss(
    spec: ModelSpec, head: Head, raw: Tensor, next_rows: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The training loss of each step against the event after it.

    Pinball loss for quantiles, Huber (1 standard deviation) for points and for a Dense head
    with targets, all on standardised values; cross-entropy for classification; nats for an
    anomaly head.

    Args:
        spec: the model, with a fitted schema.
        head: one of its heads.
        raw: float32 [B, T, U], the raw values of steps t.
        next_rows: float32 [B, T, F], the encoded rows t + 1.

    Returns:
        The loss, summed over the head's present targets, and the number of those targets,
        both float32 [B, T]; None for a head without targets.
    """
    match head:
        case DenseHead() if head.targets:
            return _regression(spec, head.targets, raw[..., tf.newaxis], (), next_rows)
        case ForecastHead():
            values = forecast_standardised(head, raw)
            return _regression(spec, head.targets, values, head.quantiles, next_rows)
        case ClassificationHead():
            return _classification(spec, head, raw, next_rows)
        case AnomalyHead():
            return anomaly_nats(spec, head, raw, next_rows)
        case _:
            return None


def _regression(
    spec: ModelSpec,
    targets: tuple[str, ...],
    values: Tensor,
    quantiles: tuple[float, ...],
    next_rows: Tensor,
) -> tuple[Tensor, Tensor]:
    truth = tf.stack([_value(spec, name, next_rows) for name in targets], axis=-1)
    present = tf.stack(
        [_present(schema_of(spec), event_field(spec, name), next_rows) for name in targets], axis=-1
    )
    error = truth[..., tf.newaxis] - values
    if quantiles:
        level = tf.constant(quantiles, tf.float32)
        loss = tf.maximum(level * error, (level - 1.0) * error)
    else:
        size = tf.abs(error)
        loss = tf.where(size <= 1.0, 0.5 * tf.square(size), size - 0.5)
    loss = tf.reduce_mean(loss, axis=-1) * present
    return tf.reduce_sum(loss, axis=-1), tf.reduce_sum(present, axis=-1)


def _classification(
    spec: ModelSpec, head: ClassificationHead, raw: Tensor, next_rows: Tensor
) -> tuple[Tensor, Tensor]:
    field = event_field(spec, head.target)
    is_normalised = isinstance(field, NumericField) and field.normalisation is not None
    column = f"{head.target}.value" if is_normalised else head.target
    value = _value(spec, column, next_rows)
    if isinstance(field, NumericField):
        value = tf.cast(value > encoded_threshold(field, head), tf.float32)
        loss = tf.nn.sigmoid_cross_entropy_with_logits(labels=value, logits=raw[..., 0])
    else:
        loss = field_nats(field, raw, value)
    present = _present(schema_of(spec), field, next_rows)
    return loss * present, present


def _label(head: LabelHead, raw: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each step's own label, and 1 if it has one, else 0; both float32 [B, T]."""
    present = tf.math.is_finite(labels)
    value = tf.where(present, labels, 0.0)
    if head.classes:
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=tf.cast(value, tf.int32), logits=raw
        )
    else:
        loss = tf.nn.sigmoid_cross_entropy_with_logits(labels=value, logits=raw[..., 0])
    counted = tf.cast(present, tf.float32)
    return loss * counted, counted


def encoded_threshold(field: NumericField, head: ClassificationHead) -> np.float32:
    """`above` as the encoder would write it, so that comparing encoded values is exact."""
    if head.above is None:
        raise SpecError(f"head {head.name!r}: expected `above` for the numeric {field.name!r}")
    return np.float32(standardise(field, head.above))


def mean_losses(
    spec: ModelSpec,
    raw: dict[str, Tensor],
    next_rows: Tensor,
    mask: Tensor,
    labels: dict[str, Tensor],
) -> dict[str, Tensor]:
    """One scalar per trained head: its loss per present target, over the steps that count.

    Args:
        spec: the model, with a fitted schema.
        raw: head name -> raw values [B, T, U].
        next_rows: float32 [B, T, F], the encoded rows t + 1; where mask is False they may
            hold anything.
        mask: bool [B, T], True where step t and the event after it exist.
        labels: label head -> float32 [B, T], each step's label as its class or 1 and 0; NaN
            if there is none, or none that counts.

    Returns:
        head name -> float32 scalar; 0 if nothing counted. Heads without targets are absent.
    """
    losses = {}
    next_rows = tf.where(mask[..., tf.newaxis], next_rows, 0.0)
    for head in spec.heads:
        if isinstance(head, LabelHead):
            total, count = map(tf.reduce_sum, _label(head, raw[head.name], labels[head.name]))
        else:
            loss = head_loss(spec, head, raw[head.name], next_rows)
            if loss is None:
                continue
            total, count = (tf.reduce_sum(tf.where(mask, part, 0.0)) for part in loss)
        losses[head.name] = total / tf.maximum(count, 1.0)
    return losses


def build_head(head: Head, units: int, width: int) -> keras.layers.Dense | None:
    """The head's Dense layer over `width` values per step, or None if it has no weights."""
    if units == 0:
        return None
    layer = keras.layers.Dense(
        units,
        activation=activation_of(head.activation) if isinstance(head, DenseHead) else "linear",
        use_bias=head.use_bias if isinstance(head, DenseHead) else True,
        dtype="float32",
        name=f"heads_{head.name}",
    )
    layer.build((None, None, width))
    return layer


def _value(spec: ModelSpec, name: str, rows: Tensor) -> Tensor:
    return rows[..., schema_of(spec).column_index[name]]


def _present(schema: EventSchema, field: EventField, rows: Tensor) -> Tensor:
    """1 if the field is in the event, 0 if it is missing; float32 [B, T]."""
    missing = schema.column_index.get(f"{field.name}.missing")
    if missing is None:
        return tf.ones_like(rows[..., 0])
    return 1.0 - rows[..., missing]


def last_observed(spec: ModelSpec, rows: Tensor, mask: Tensor, before: Tensor) -> Tensor:
    """The state part `decoder.last` after the chunk.

    Args:
        spec: a model with a decoder, D targets.
        rows: float32 [B, T, F], encoded.
        mask: bool [B, T], True where a step is valid.
        before: float32 [B, D], the part before the chunk; a target that no valid step has
            keeps its value.

    Returns:
        float32 [B, D].
    """
    if spec.decoder is None or spec.events is None:
        raise SpecError(f"model {spec.name!r}: expected a decoder")
    index = spec.events.column_index
    targets = spec.decoder.targets
    values = tf.gather(rows, [index[name] for name in targets], axis=2)
    present = []
    for name in targets:
        missing = index.get(f"{name}.missing")
        present.append(mask if missing is None else mask & (rows[..., missing] < 0.5))
    steps = tf.range(1, tf.shape(rows)[1] + 1)[tf.newaxis, :, tf.newaxis]
    at = tf.reduce_max(tf.where(tf.stack(present, axis=-1), steps, 0), axis=1)
    series = tf.concat([before[:, tf.newaxis, :], values], axis=1)
    return tf.gather(tf.transpose(series, [0, 2, 1]), at, batch_dims=2)
