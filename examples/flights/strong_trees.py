"""`python -m examples.flights.strong_trees`: boosted trees beside the included network.

LightGBM (pip install lightgbm==4.7.0) on the last 20 events, as the trees of a report see them,
with and without the airport's fields. `docs/explanation/examples.md` fixes settings and measure;
October chooses the number of trees. Prints a table of log losses of `late` in November and
December; the intervals are 95%, by resampling days. Fitted trees are kept in
`build/examples/flights-trees`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.command import BUILT
from examples.flights.__main__ import OUT
from models.artifact.artifact import load_artifact
from models.decoding.losses import score_binary
from models.events.calendar import zone_table
from models.pretrained.airport import AIRPORT_COLUMNS
from models.pretrained.departures import flight_events
from models.spec.layout import output_spec
from models.spec.model import ModelSpec, schema_of
from models.training.data import Streams, split_of, streams_of
from models.training.evaluate import run_chunks, scored_rows
from models.training.scores import DRAWS, DayDraws, compare_scored, score_cell
from models.training.trees import tree_features

FITTED = BUILT / "flights-trees"
EVENTS, MOST_TREES, LATE_MINUTES = 20, 1000, 15
SETTINGS: Mapping[str, Any] = {
    "objective": "binary",
    "metric": "binary_logloss",
    "num_leaves": 63,
    "min_data_in_leaf": 100,
    "learning_rate": 0.05,
    "deterministic": True,
    "force_row_wise": True,
    "seed": 1,
    "verbose": -1,
}


def without_airport(spec: ModelSpec) -> ModelSpec:
    """The specification whose events do not have the airport's fields."""
    schema = schema_of(spec)
    fields = tuple(field for field in schema.fields if field.name not in AIRPORT_COLUMNS)
    return spec.model_copy(update={"events": schema.model_copy(update={"fields": fields})})


def tree_probabilities(
    name: str,
    spec: ModelSpec,
    streams: Streams,
    late: NDArray[np.bool_],
) -> tuple[NDArray[np.float64], int]:
    """The probability of `late` at each test row, and the number of trees.

    Args:
        name: of the fitted trees, which are used again if they are there.
        spec: fitted; the trees see its fields.
        streams: with the rows of these fields.
        late: bool [rows].
    """
    import lightgbm

    split = split_of(spec)
    rows = streams.encoded(schema_of(spec))
    features, _ = tree_features(spec, rows, streams.spans, EVENTS, categorical=False)
    path = FITTED / f"{name}.txt"
    if not path.exists():
        train, validate = (
            lightgbm.Dataset(features[at - 1], late[at])
            for at in (
                scored_rows(streams, None, split.validate),
                scored_rows(streams, split.validate, split.test),
            )
        )
        losses: dict[str, dict[str, list[float]]] = {}
        fitted = lightgbm.train(
            dict(SETTINGS),
            train,
            MOST_TREES,
            valid_sets=[validate],
            valid_names=["validate"],
            callbacks=[lightgbm.record_evaluation(losses)],
        )
        curve = losses["validate"]["binary_logloss"]
        count = int(np.argmin(curve)) + 1
        print(f"{name}: {count} trees, {curve[count - 1]:.4f} in October", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        fitted.save_model(path, num_iteration=count)
    trees = lightgbm.Booster(model_file=path)
    test = scored_rows(streams, split.test)
    return np.asarray(trees.predict(features[test - 1])), trees.num_trees()


def main() -> None:
    """Fit what is not there, score, print."""
    artifact = load_artifact(OUT)
    frame = flight_events()
    streams = streams_of(artifact.spec, frame, "flights")
    late = streams.frame["dep_delay"].to_numpy() > LATE_MINUTES
    test = scored_rows(streams, split_of(artifact.spec).test)

    trees = {}
    for name, spec in (("with", artifact.spec), ("without", without_airport(artifact.spec))):
        seen = streams_of(spec, frame, "flights")
        probability, count = tree_probabilities(name, spec, seen, late)
        shown = f"{count} trees {name} the airport's fields"
        trees[shown] = score_binary(probability, late[test].astype(np.float64))

    outputs = output_spec(artifact.spec).by_name(run_chunks(artifact, streams, chunk=64, seed=0))
    network = score_binary(
        outputs["late"][test - 1].astype(np.float64), late[test].astype(np.float64)
    )
    days = zone_table(schema_of(artifact.spec).timezone).days(streams.moments_ms[test])
    compared = compare_scored(network, trees, DayDraws.make(days, DRAWS, 0))
    print("| | log loss | minus network | AUC | minus network |\n|" + " --- |" * 5)
    for name, scores in compared["scores"].items():
        differences = compared["difference"].get(name, {})
        cells = [
            cell
            for metric in ("log_loss", "auc")
            for cell in (score_cell(scores[metric]), score_cell(differences.get(metric), "+"))
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
