"""Outputs of a load, computed a second time and compared.

    |a - b| <= 1e-5 + 1e-5 |b|        a: received, chunk by chunk, under load; b: computed anew

Two ways to compute them. Without more than an address, the same service gets a stream's whole
history once more: in one `/predict` call, which knows no streams, no chunks and no stored
state; or, for a model whose outputs depend on the cuts, as the same chunks on a second stream,
alone. With the model's directory, the float64 network of `tests/support/oracle.py` runs over
it, which shares nothing with the service but the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tests.load.description import Description
from tests.load.measures import Compared, Measures
from tests.load.scenarios import LoadError
from tests.load.streams import Applied, Fault, Population, Stream
from tests.load.tape import BODY_SHARE

Outputs = NDArray[np.float64]
Recompute = Callable[[Stream, Sequence[Applied]], Outputs]
"""The outputs [T, O] of a stream's first chunks, computed anew."""
Ask = Callable[[str, bytes], Any]
"""Posts a body to a path of the service; the document that comes back, or LoadError."""

BOUND = 1e-5


def by_the_service(ask: Ask, model: Description) -> tuple[str, Recompute]:
    """A second computation by the service itself."""
    path = f"/v1/models/{model.name}"

    def predict(stream: Stream, history: Sequence[Applied]) -> Outputs:
        body = b'{"sequences":[{"%b":[%b]}]}' % (stream.tape.member, _events(stream, history))
        (found,) = ask(f"{path}/predict", body)["predictions"]
        return model.pack(found["outputs"], _steps(history))

    def again(stream: Stream, history: Sequence[Applied]) -> Outputs:
        parts = []
        for each in history:
            body = b'{"position":%d,"%b":[%b]}' % (
                each.start,
                stream.tape.member,
                stream.tape.json(each.chunk),
            )
            reply = ask(f"{path}/streams/{stream.name}.again/chunks", body)
            parts.append(model.pack(reply["outputs"], each.chunk.steps))
        return np.concatenate(parts)

    return ("predict", predict) if model.invisible else ("second_stream", again)


def by_the_oracle(folder: Path, model: Description) -> tuple[str, Recompute]:
    """A second computation by the float64 network, from the weights in the model's directory.

    Raises:
        LoadError: no artifact there, or that of another version than the one served.
    """
    try:
        from models.artifact.artifact import load_artifact
        from models.errors import ModelsError
        from models.events.columns import columns_from_events
        from models.events.encode import Clock, encode
        from models.events.parse import event_adapter
        from tests.support.oracle import oracle_step
    except ImportError as error:
        raise LoadError(f"--artifact needs the project beside the load tests: {error}") from error
    try:
        artifact = load_artifact(folder)
    except ModelsError as error:
        raise LoadError(f"--artifact {folder}: {error}") from error
    if not artifact.fingerprint.hex().startswith(model.version):
        raise LoadError(
            f"--artifact {folder}: expected version {model.version}, which is served, got "
            f"{artifact.fingerprint.hex()[: len(model.version)]}"
        )

    def oracle(stream: Stream, history: Sequence[Applied]) -> Outputs:
        document = b"[%b]" % _events(stream, history)
        if stream.tape.member == b"inputs":
            rows = np.array(orjson.loads(document), np.float32)
        else:
            schema = artifact.spec.events
            assert schema is not None
            adapter = event_adapter(schema)
            events = [adapter.validate_python(event) for event in orjson.loads(document)]
            rows, _ = encode(schema, columns_from_events(schema, events), Clock())
        return oracle_step(artifact.spec, artifact.weights, rows, artifact.state.zero().floats)[0]

    return "oracle", oracle


def settle(
    population: Population,
    model: Description,
    way: tuple[str, Recompute],
    max_events: int,
    measures: Measures,
) -> Compared:
    """Judge the streams' histories and outputs, once all chunks are settled.

    Args:
        max_events: longest beginning of a stream that is computed in one go.
        measures: where faults are counted.
    """
    for stream in population.appended or population.kept:
        history = stream.history()
        if isinstance(history, Fault):
            measures.fault(history)
    compared, faults = compare(population.kept, model, way, max_events)
    for fault in faults:
        measures.fault(fault)
    return compared


def compare(
    streams: Sequence[Stream],
    model: Description,
    way: tuple[str, Recompute],
    max_events: int,
) -> tuple[Compared, list[Fault]]:
    """Compare the kept outputs of these streams with what `way` gives.

    Args:
        max_events: longest beginning of a stream that is computed in one go.

    Returns:
        What was compared, and a fault for each stream that is not right.
    """
    how, recompute = way
    count, events, excess = 0, 0, 0.0
    faults = []
    for stream in streams:
        history = stream.history()
        if isinstance(history, Fault):
            continue
        history = _beginning(history, min(max_events, _limit(stream, model)))
        if not any(each.outputs is not None for each in history):
            continue
        wanted = recompute(stream, history)
        worst, where = 0.0, 0
        for each in history:
            if each.outputs is None:
                continue
            b = wanted[each.start : each.start + each.chunk.steps]
            over = np.abs(each.outputs - b) - BOUND * np.abs(b)
            events += each.chunk.steps
            if over.size and over.max() > worst:
                worst, where = float(over.max()), each.start
        count += 1
        excess = max(excess, worst)
        if worst > BOUND:
            faults.append(
                Fault(
                    "wrong_outputs",
                    f"stream {stream.name!r}, chunk at {where}: |a-b| - 1e-5|b| is {worst:.2e}, "
                    f"expected at most 1e-5, by {how}",
                )
            )
    return Compared(how, count, events, excess), faults


def _limit(stream: Stream, model: Description) -> int:
    """Events of a stream that fit into one request to compute them."""
    by_size = int(model.max_body_bytes * BODY_SHARE) // stream.tape.event_bytes
    return min(model.max_predict_steps, by_size)


def _beginning(history: Sequence[Applied], max_events: int) -> list[Applied]:
    return [each for each in history if each.start + each.chunk.steps <= max_events]


def _steps(history: Sequence[Applied]) -> int:
    return sum(each.chunk.steps for each in history)


def _events(stream: Stream, history: Sequence[Applied]) -> bytes:
    return b",".join(_pieces(stream, history))


def _pieces(stream: Stream, history: Sequence[Applied]) -> Iterator[bytes]:
    for each in history:
        yield stream.tape.json(each.chunk)
