"""The flights model fed by `events` against the same model fed by `inputs`, with ragged cuts.

The events are real departures of one airline from one airport, cut into chunks of 1 to 64; the
inputs are the rows that the model's own encoder makes of them. So both sides compute the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import polars as pl

import models
from models.artifact.artifact import Artifact, load_artifact, write_artifact
from models.events.encode import Clock, encode
from models.events.frame import columns_from_frame
from models.examples.flights.data import flight_events
from tests.bench.context import Bench
from tests.bench.networks import TRAINED_TOLERANCE, Bodies

STREAM = "EWR-UA"
CUTS = 64
LONGEST_STEPS = 64


def run(bench: Bench) -> None:
    """For each runtime one server, events and inputs in turns."""
    artifact = flights_model(bench.folder)
    bodies = ragged_flights(artifact)
    for kind in bench.carry_kinds(artifact):
        with (
            bench.store() as store,
            bench.drivers() as [driver],
            bench.server(kind, store, artifact) as server,
        ):
            feeds = {"events": bodies, "inputs": replace(bodies, events=None)}
            for feed, blocks in feeds.items():
                bench.ready(
                    driver,
                    feed,
                    server,
                    blocks,
                    artifact=artifact,
                    tolerance=TRAINED_TOLERANCE,
                    model="flights",
                )
            for _ in range(bench.options.rounds):
                for feed in feeds:
                    bench.closed(f"events/{feed}/{kind}", driver, feed, server, store)
        bench.results.ratio(
            f"events/{kind} events over inputs", f"events/events/{kind}", f"events/inputs/{kind}"
        )


def flights_model(folder: Path) -> Artifact:
    """The pretrained model, packaged anew so that it has a graph for every runtime."""
    shipped = load_artifact(Path(models.__file__).parent / "pretrained" / "flights")
    return write_artifact(folder / "models-flights" / "flights", shipped.spec, shipped.weights)


def ragged_flights(artifact: Artifact) -> Bodies:
    """Consecutive departures in chunks of 1 to 64, both as events and as rows."""
    schema = artifact.spec.events
    assert schema is not None
    cuts = np.random.default_rng(1).integers(1, LONGEST_STEPS, CUTS, endpoint=True)
    ends = np.cumsum(cuts)
    frame = flight_events().filter(pl.col("stream") == STREAM).head(int(ends[-1]))
    columns = columns_from_frame(schema, frame)
    rows, _ = encode(schema, columns, Clock())
    wire = frame.select(
        pl.col(field.name).dt.epoch("ms") if field.kind == "timestamp" else pl.col(field.name)
        for field in schema.fields
    ).to_dicts()
    events = [{name: value for name, value in event.items() if value is not None} for event in wire]
    slices = [slice(end - cut, end) for cut, end in zip(cuts.tolist(), ends.tolist(), strict=True)]
    return Bodies(
        tuple(rows[cut] for cut in slices), tuple(orjson.dumps(events[cut]) for cut in slices)
    )
