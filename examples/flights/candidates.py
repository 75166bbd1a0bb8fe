"""`python -m examples.flights.candidates [NAME...]`: networks and trees on August to October.

Trains each candidate (all by default) on January to July, networks unless they are in
`build/examples/flights-candidates`, and prints the mean log loss of `late` in August, September and
October. Nothing is scored on November and December. Trees need LightGBM: pip install
lightgbm==4.7.0. `docs/explanation/examples.md` has the figures.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import yaml

from examples.command import BUILT
from examples.flights.__main__ import OUT, SPEC
from examples.flights.strong_trees import EVENTS, LATE_MINUTES, SETTINGS, without_airport
from models.artifact.artifact import load_artifact
from models.artifact.manifest import MANIFEST_NAME
from models.decoding.losses import score_binary
from models.pretrained.departures import flight_events
from models.spec.layout import output_spec
from models.spec.model import ModelSpec, parse_spec, schema_of
from models.training.data import moment_ms, split_of, streams_of
from models.training.evaluate import run_network, scored_rows
from models.training.trainer import train
from models.training.trees import tree_features

FITTED = BUILT / "flights-candidates"
VALIDATE_FROM = "2013-08-01"
STRONG = {"rate": 0.4, "input_rate": 0.1, "weight_decay": 0.1, "unknown": 0.1}
NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "96": {"units": 96},
    "96-16": {"units": 96, "epochs": 16},
    "64-strong": {"units": 64, **STRONG},
    "96-steps": {"units": 96, "epochs": 14, "weigh": "steps"},
    "96-steps-average": {"units": 96, "epochs": 14, "weigh": "steps", "members": 3},
}
"""By name, the arguments of `candidate`."""
TREES = ("trees", "trees-without-airport")
LEAVES, MOST_TREES = (31, 63), 600
TREE_OPTIONS = {"learning_rate": 0.1, "feature_fraction": 0.5}
"""What differs from the settings of `strong_trees`."""


def candidate(
    units: int,
    rate: float = 0.3,
    input_rate: float = 0.0,
    weight_decay: float = 1e-4,
    unknown: float = 0.0,
    epochs: int = 8,
    weigh: str = "windows",
    members: int = 1,
) -> ModelSpec:
    """`spec.yaml` with other layers and regularisation, validated from `VALIDATE_FROM` on.

    Args:
        units: of each LSTM.
        rate: dropout after each LSTM and the dense layer.
        input_rate: dropout of the features.
        weight_decay: of AdamW, on matrices.
        unknown: share of the categories that training hides.
        epochs: over which the learning rate falls to zero.
        weigh: what has equal weight in the loss, `windows` or `steps`.
        members: networks, from seeds 1 and following, that are averaged.
    """
    written = yaml.safe_load(SPEC.read_text(encoding="utf-8"))
    layers = written["layers"]
    for layer in layers:
        if layer["kind"] == "lstm":
            layer["units"] = units
        if layer["kind"] == "dropout":
            layer["rate"] = rate
    if input_rate:
        layers.insert(0, {"kind": "dropout", "rate": input_rate})
    written["training"] |= {
        "validate_from": VALIDATE_FROM,
        "batch_streams": 32,
        "epochs": epochs,
        "weigh": weigh,
        "weight_decay": weight_decay,
        "unknown_rate": unknown,
        "seeds": members,
        "members": members,
    }
    return parse_spec(written)


def network_loss(name: str, frame: pl.DataFrame) -> str:
    """The loss of a network, which is trained unless it is there."""
    path = FITTED / name
    if not (path / MANIFEST_NAME).exists():
        train(candidate(**NETWORKS[name]), frame, path, overwrite=True, source="flights")
    artifact = load_artifact(path)
    spec = artifact.spec
    streams = streams_of(spec, frame, "flights")
    outputs = output_spec(spec).by_name(run_network(spec, artifact.weights, streams))
    begin = moment_ms(schema_of(spec), VALIDATE_FROM, "VALIDATE_FROM")
    at = scored_rows(streams, begin, split_of(spec).test)
    late = streams.frame["dep_delay"].to_numpy()[at] > LATE_MINUTES
    scored = score_binary(outputs["late"][at - 1].astype(np.float64), late.astype(np.float64))
    loss = scored.losses["log_loss"].mean()
    epochs = ", ".join(map(str, artifact.manifest["training"]["best_epochs"]))
    return f"{loss:.4f}, epoch {epochs}"


def tree_loss(name: str, frame: pl.DataFrame) -> str:
    """The loss of LightGBM's trees on the fields of the included network."""
    import lightgbm

    spec = load_artifact(OUT).spec
    spec = spec if name == TREES[0] else without_airport(spec)
    schema, streams = schema_of(spec), streams_of(spec, frame, "flights")
    late = streams.frame["dep_delay"].to_numpy() > LATE_MINUTES
    rows = streams.encoded(schema)
    features, _ = tree_features(spec, rows, streams.spans, EVENTS, categorical=False)
    begin = moment_ms(schema, VALIDATE_FROM, "VALIDATE_FROM")
    before, validate = (
        lightgbm.Dataset(features[at - 1], late[at])
        for at in (
            scored_rows(streams, None, begin),
            scored_rows(streams, begin, split_of(spec).test),
        )
    )
    tried: list[tuple[float, int, int]] = []
    for leaves in LEAVES:
        curve: dict[str, dict[str, list[float]]] = {}
        record = lightgbm.record_evaluation(curve)
        options = {**SETTINGS, **TREE_OPTIONS, "num_leaves": leaves}
        lightgbm.train(options, before, MOST_TREES, valid_sets=[validate], callbacks=[record])
        losses = curve["valid_0"]["binary_logloss"]
        tried.append((min(losses), int(np.argmin(losses)) + 1, leaves))
    return "{:.4f}, {} trees of {} leaves".format(*min(tried))


def main() -> None:
    """Train what is missing, print."""
    frame = flight_events()
    for name in sys.argv[1:] or (*NETWORKS, *TREES):
        print(f"{name}: {(tree_loss if name in TREES else network_loss)(name, frame)}", flush=True)


if __name__ == "__main__":
    main()
