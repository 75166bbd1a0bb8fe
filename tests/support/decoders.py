"""Small encoder/decoder models, and a stream's state and future for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.events.encode import Clock
from models.spec.layout import state_spec
from models.spec.model import ModelSpec, parse_spec

HOUR_MS = 3_600_000
START_MS = 1_700_000_000_000


def decoder_spec(**changes: Any) -> ModelSpec:
    """Two targets, one of them optional and one in logarithms; three known fields.

    Args:
        changes: members of the section `decoder` to set; None leaves one out.
    """
    decoder: dict[str, Any] = {
        "step_s": 3600,
        "targets": ["warmth", "rain"],
        "known": ["holiday", "tariff", "wind"],
        "layers": [
            {"kind": "lstm", "units": 4, "starts_from": "lstm_1"},
            {"kind": "gru", "units": 3, "starts_from": "gru_1"},
            {"kind": "dense", "units": 5, "activation": "tanh"},
        ],
        "head": {"kind": "quantiles", "quantiles": [0.1, 0.5, 0.8, 0.95]},
        "max_horizon": 12,
        **changes,
    }
    return parse_spec(
        {
            "name": "weather",
            "events": {
                "timezone": "America/New_York",
                "fields": [
                    {"kind": "numeric", "name": "warmth", "mean": 12.0, "std": 8.0},
                    {"kind": "timestamp", "name": "at", "gap_mean": 8.0, "gap_std": 0.5},
                    {"kind": "boolean", "name": "holiday"},
                    {
                        "kind": "numeric",
                        "name": "rain",
                        "optional": True,
                        "transform": "signed_log1p",
                        "mean": 0.4,
                        "std": 0.7,
                    },
                    {
                        "kind": "categorical",
                        "name": "tariff",
                        "embedding": 2,
                        "vocabulary": ["day", "night"],
                    },
                    {
                        "kind": "numeric",
                        "name": "wind",
                        "optional": True,
                        "mean": 5.0,
                        "std": 3.0,
                    },
                ],
            },
            "layers": [
                {"kind": "lstm", "units": 4},
                {"kind": "gru", "units": 3},
            ],
            "heads": [{"kind": "forecast", "name": "next", "targets": ["warmth"]}],
            "decoder": {name: value for name, value in decoder.items() if value is not None},
        }
    )


def random_state(spec: ModelSpec, seed: int = 3) -> NDArray[np.float32]:
    """A state that is not zero, float32 [N], hidden parts within 1."""
    size = state_spec(spec).float_size
    return np.random.default_rng(seed).uniform(-1, 1, size).astype(np.float32)


def clock(events: int = 5) -> Clock:
    """The clock of a stream of hourly events from `START_MS` on."""
    return Clock(START_MS + (events - 1) * HOUR_MS, events, 0)


def hourly_events(count: int, seed: int = 0, first: int = 0) -> list[dict[str, Any]]:
    """Plain events, an hour apart, from number `first` on."""
    found = []
    for number in range(first, first + count):
        random = np.random.default_rng([seed, number])
        event: dict[str, Any] = {
            "warmth": float(np.round(random.normal(12, 8), 3)),
            "at": START_MS + number * HOUR_MS,
            "holiday": bool(random.integers(2)),
            "tariff": ["day", "night"][int(random.integers(2))],
        }
        if random.random() < 0.6:
            event["rain"] = float(np.round(random.exponential(1.0), 3))
        if random.random() < 0.8:
            event["wind"] = float(np.round(random.normal(5, 3), 3))
        found.append(event)
    return found


def future_of(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """The known future covariates of a forecast."""
    names = ("holiday", "tariff", "wind")
    return [
        {name: event[name] for name in names if name in event}
        for event in hourly_events(count, seed)
    ]
