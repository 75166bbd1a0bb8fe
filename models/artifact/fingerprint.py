"""Fingerprint of a model: a hash of everything that determines its outputs, and of nothing else.

Two models with the same fingerprint have the same outputs for the same events and can continue
from each other's states. Renaming a model, changing its description, training it differently with
the same result or writing it with other library versions does not change the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from models.events.schema import EventField
from models.spec.decoder import DistributionHead
from models.spec.detection import AlarmSpec
from models.spec.heads import Head
from models.spec.layers import Layer
from models.spec.layout import detection_state
from models.spec.model import ModelSpec

FINGERPRINT_BYTES = 16
VERSION_DIGITS = 12

_NUMERICS = 1
"""Incremented when the same spec and weights have other outputs (encoding, gate order)."""

_IGNORED_FIELD_OPTIONS = {
    "description",
    "max_vocabulary",
    "min_count",
    "coerce",
    "epoch",
    "without_offset",
}
_IGNORED_LAYER_OPTIONS = {"dropout", "recurrent_dropout", "rate"}
_IGNORED_HEAD_OPTIONS = {"dense": {"targets"}, "label": {"column"}}
_IGNORED_DECODER_OPTIONS = {"max_horizon"}


def compute_fingerprint(
    spec: ModelSpec, weights: Mapping[str, NDArray[Any]], network: bytes | None = None
) -> bytes:
    """Compute the fingerprint: 16 bytes of SHA-256 over the relevant spec and the weights.

    Args:
        spec: a fitted spec.
        weights: arrays by name, as `models.artifact.weights` expects them: float32, or the initial
            values of an imported graph in the dtypes of its state.
        network: the imported graph, if the model is one.
    """
    digest = hashlib.sha256(canonical_json(_relevant_spec(spec)))
    for name in sorted(weights):
        array = weights[name]
        head = {"name": name, "shape": list(array.shape)}
        digest.update(canonical_json(head))
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    if network is not None:
        digest.update(hashlib.sha256(network).digest())
    return digest.digest()[:FINGERPRINT_BYTES]


def version_of(fingerprint: str) -> str:
    """The version that a fingerprint, in hex, names: its first digits."""
    return fingerprint[:VERSION_DIGITS]


def canonical_json(value: Any) -> bytes:
    """Encode as UTF-8 JSON with sorted keys and no spaces: equal values have equal bytes.

    Raises:
        ValueError: NaN or infinity.
        TypeError: a value without a JSON representation.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def _relevant_spec(spec: ModelSpec) -> dict[str, Any]:
    events: dict[str, Any] | None = None
    if spec.events is not None:
        events = {
            "fields": [_part(field, _IGNORED_FIELD_OPTIONS) for field in spec.events.fields],
            # Only the calendar features of a timestamp depend on the time zone.
            "timezone": spec.events.timezone if spec.events.timestamp else None,
        }
    sections: dict[str, Any] = {}
    if spec.decoder is not None:
        own = spec.decoder
        sections["decoder"] = {
            **own.model_dump(
                exclude={"layers", "head", *_IGNORED_DECODER_OPTIONS}, exclude_defaults=True
            ),
            "layers": [_part(layer, _IGNORED_LAYER_OPTIONS) for layer in own.layers],
            "head": _part(own.head, set()),
        }
    if spec.detection is not None:
        # A deployment may change the rate of alarms, and streams continue.
        own_detection = spec.detection.with_alarm_rate(AlarmSpec().false_alarms_per_day)
        sections["detection"] = own_detection.model_dump(mode="json", exclude_defaults=True)
        parts = detection_state(spec).parts
        sections["detection"]["state"] = {part.name: part.shape for part in parts}
    if spec.embeddings:
        sections["embeddings"] = [embedded.model_dump() for embedded in spec.embeddings]
    if spec.blocks is not None:
        sections["blocks"] = spec.blocks.model_dump()
    for name in ("reset_every", "session_gap_s"):
        if (value := getattr(spec, name)) is not None:
            sections[name] = value
    if spec.onnx is not None:
        without_effect: dict[str, Any] = {"batching": True, "outputs": {"__all__": {"labels"}}}
        sections["onnx"] = spec.onnx.model_dump(exclude=without_effect, exclude_defaults=True)
    return {
        "numerics": _NUMERICS,
        **sections,
        "events": events,
        "features": spec.features,
        "layers": [_part(layer, _IGNORED_LAYER_OPTIONS) for layer in spec.layers],
        "heads": [_part(head, _IGNORED_HEAD_OPTIONS.get(head.kind, set())) for head in spec.heads],
    }


def _part(part: EventField | Layer | Head | DistributionHead, ignored: set[str]) -> dict[str, Any]:
    """A field, layer or head without options that have no effect and without defaults.

    An option that a later version adds has its default in every older model, and
    so does not change their fingerprints, under which states are stored.
    """
    return {**part.model_dump(exclude=ignored, exclude_defaults=True), "kind": part.kind}
