"""What the events of a chunk cost, from their bytes to rows, stage by stage, without a service.

    python -m tests.bench.micro_events [--repeats 40] [--calls 40]

Made-up departures under the schema of the packaged flights model, with weather that is sometimes
absent and timestamps written as RFC 3339 or as epoch milliseconds. Prints microseconds a chunk,
the least of the repeats: `strict` and `columns` are what events cost that the reader leaves to
the strict type; `decode` and `take out` what the reader takes for the same, `take 32` for each
of 32 chunks together; `digest` and `encode` what follows either way, and `of N` encoding for
each of N chunks together.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import orjson
from pydantic import TypeAdapter

import models
from models.artifact.artifact import load_artifact
from models.events.columns import canonical_bytes, columns_from_events
from models.events.encode import Clock, encode, encode_many
from models.events.parse import event_type
from models.events.reader import EventReader
from models.events.schema import CategoricalField, EventSchema

STEPS = (1, 16, 64)
BATCHES = (2, 8, 32)
FLIGHTS = Path(models.__file__).parent / "pretrained" / "flights"
FIRST = datetime(2013, 7, 21, 23, 10, tzinfo=UTC)
ABSENT = 0.03
"""The share of optional values that are absent."""

Times = Literal["text", "number"]
TIMES: tuple[Times, ...] = ("text", "number")


def departures(
    schema: EventSchema, random: np.random.Generator, count: int, times: Times
) -> list[dict[str, Any]]:
    """Events in the order of their time."""
    events = []
    moment = FIRST
    for _ in range(count):
        moment += timedelta(minutes=int(random.integers(0, 90)))
        event: dict[str, Any] = {}
        for field in schema.fields:
            if field.optional and random.random() < ABSENT:
                continue
            if field.kind == "timestamp":
                number = int(moment.timestamp() * 1000)
                event[field.name] = moment.isoformat() if times == "text" else number
            elif isinstance(field, CategoricalField):
                event[field.name] = str(random.choice(field.vocabulary or ("a",)))
            else:
                event[field.name] = round(float(random.normal(20, 9)), 2)
        events.append(event)
    return events


def least_us(call: Callable[[], Any], calls: int, repeats: int) -> float:
    """Microseconds of one call, the least mean of the repeats."""
    found = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - began_s) / calls)
    return 1e6 * min(found)


def stages(schema: EventSchema, body: bytes) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    reader = EventReader(schema)
    strict: TypeAdapter[list[dict[str, Any]]] = TypeAdapter(list[event_type(schema)])  # type: ignore[misc]
    decoder = msgspec.json.Decoder(list[reader.event])  # type: ignore[name-defined]
    events, objects = strict.validate_json(body), decoder.decode(body)
    columns, clock = reader.columns(objects), Clock()
    if columns is None:
        raise ValueError("expected events that the reader takes")

    def together(chunks: int) -> Callable[[], Any]:
        return lambda: encode_many(schema, [columns] * chunks, [clock] * chunks)

    return {
        "strict": lambda: strict.validate_json(body),
        "columns": lambda: columns_from_events(schema, events),
        "decode": lambda: decoder.decode(body),
        "take out": lambda: reader.columns(objects),
        "take 32": lambda: reader.columns_many([objects] * 32),
        "digest": lambda: hashlib.sha256(canonical_bytes(schema, columns)).digest(),
        "encode": lambda: encode(schema, columns, clock),
        **{f"of {chunks}": together(chunks) for chunks in BATCHES},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--calls", type=int, default=40)
    options = parser.parse_args()
    schema = load_artifact(FLIGHTS).spec.events
    if schema is None:
        raise ValueError("expected a model with an event schema")
    random = np.random.default_rng(7)
    header = ""
    for times in TIMES:
        for steps in STEPS:
            body = orjson.dumps(departures(schema, random, steps, times))
            measured = {
                name: least_us(call, options.calls, options.repeats) / _chunks(name)
                for name, call in stages(schema, body).items()
            }
            if not header:
                header = "times     T " + "".join(f"{name:>10}" for name in measured)
                print(header)
            print(f"{times:6} {steps:4} " + "".join(f"{us:10.1f}" for us in measured.values()))


def _chunks(name: str) -> int:
    together, _, chunks = name.rpartition(" ")
    return int(chunks) if together in ("of", "take") and chunks.isdigit() else 1


if __name__ == "__main__":
    main()
