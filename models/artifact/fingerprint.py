"""The fingerprint of a model: a hash of what determines its numbers, and of nothing else.

Two models with the same fingerprint give the same outputs for the same events and can go on
from each other's states. Renaming a model, describing it, training it in another way with
the same result or writing it with other library versions does not change the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.events.schema import EventField
from models.spec.decoder import DistributionHead
from models.spec.heads import Head
from models.spec.layers import Layer
from models.spec.model import ModelSpec

FINGERPRINT_BYTES = 16

_NUMERICS = 1
"""Raised when the same spec and weights come to mean other numbers (encoding, gate order)."""

_FIELD_NOTES = {"description", "max_vocabulary"}
_LAYER_NOTES = {"dropout", "recurrent_dropout", "rate"}
_HEAD_NOTES = {"dense": {"targets"}, "label": {"column"}}
_DECODER_NOTES = {"max_horizon"}


def fingerprint(spec: ModelSpec, weights: Mapping[str, NDArray[np.float32]]) -> bytes:
    """The first 16 bytes of SHA-256 over the spec's numbers and the weights.

    Args:
        spec: a fitted spec.
        weights: float32 arrays by name, as `models.spec.layout.weight_shapes` names them.
    """
    digest = hashlib.sha256(canonical_json(_numbers(spec)))
    for name in sorted(weights):
        array = weights[name]
        head = {"name": name, "shape": list(array.shape)}
        digest.update(canonical_json(head))
        digest.update(array.astype("<f4").tobytes())
    return digest.digest()[:FINGERPRINT_BYTES]


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes.

    Raises:
        ValueError: NaN or infinity.
        TypeError: something that JSON does not know.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def _numbers(spec: ModelSpec) -> dict[str, Any]:
    events: dict[str, Any] | None = None
    if spec.events is not None:
        events = {
            "fields": [_part(field, _FIELD_NOTES) for field in spec.events.fields],
            # Only the calendar features of a timestamp read the zone.
            "timezone": spec.events.timezone if spec.events.timestamp else None,
        }
    sections: dict[str, Any] = {}
    if spec.decoder is not None:
        own = spec.decoder
        sections["decoder"] = {
            **own.model_dump(exclude={"layers", "head", *_DECODER_NOTES}, exclude_defaults=True),
            "layers": [_part(layer, _LAYER_NOTES) for layer in own.layers],
            "head": _part(own.head, set()),
        }
    if spec.blocks is not None:
        sections["blocks"] = spec.blocks.model_dump()
    return {
        "numerics": _NUMERICS,
        **sections,
        "events": events,
        "features": spec.features,
        "layers": [_part(layer, _LAYER_NOTES) for layer in spec.layers],
        "heads": [_part(head, _HEAD_NOTES.get(head.kind, set())) for head in spec.heads],
    }


def _part(part: EventField | Layer | Head | DistributionHead, notes: set[str]) -> dict[str, Any]:
    """One field, layer or head without its notes and without what is at its default.

    An option that a later version adds is at its default in every model made before it, and
    so leaves their fingerprints, and the states stored under them, as they are.
    """
    return {**part.model_dump(exclude=notes, exclude_defaults=True), "kind": part.kind}
