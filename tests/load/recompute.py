"""Second computation of a load's outputs, and the comparison with what was received.

    |a - b| <= 1e-5 + 1e-5 |b|        a: received, chunk by chunk, under load; b: recomputed

With only an address, the same service computes a stream's whole history once more: in one
`/predict` call, which has no streams, no chunks and no stored state; or, for a model whose outputs
depend on the cuts, as the same chunks on a second stream. With the model's directory, the float64
network of `tests/support/oracle.py` computes it, which shares only the weights with the service.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.client import ModelDescription, stream_path
from tests.load.feeds import BODY_SHARE
from tests.load.results import Compared
from tests.load.scenarios import LoadError
from tests.load.sender import Load
from tests.load.stream import Applied, Fault, LoadStream

Recompute = Callable[[LoadStream, Sequence[Applied]], NDArray[Any]]
"""The outputs [T, O] of a stream's first chunks, computed a second time."""
Request = Callable[[str, Any], Any]
"""Posts a document to a path of the service and returns the reply; raises LoadError."""

BOUND = 1e-5


def by_service(request: Request, model: ModelDescription) -> tuple[str, Recompute]:
    """A second computation by the service itself."""

    def predict(stream: LoadStream, history: Sequence[Applied]) -> NDArray[Any]:
        events = _events(stream, history)
        body = {"sequences": [{stream.feed.member: events}]}
        (prediction,) = request(f"/v1/models/{model.name}/predict", body)["predictions"]
        return model.pack(prediction["outputs"], len(events))

    def send_again(stream: LoadStream, history: Sequence[Applied]) -> NDArray[Any]:
        path = f"{stream_path(model.name, f'{stream.name}.again')}/chunks"
        parts = []
        for each in history:
            body = {"position": each.start, stream.feed.member: stream.feed.events(each.chunk)}
            parts.append(model.pack(request(path, body)["outputs"], each.chunk.steps))
        return np.concatenate(parts)

    return ("predict", predict) if model.is_cut_invariant else ("second_stream", send_again)


def by_oracle(folder: Path, model: ModelDescription) -> tuple[str, Recompute]:
    """A second computation by the float64 network, with the weights of the model's directory.

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
    schema = artifact.spec.events

    def oracle(stream: LoadStream, history: Sequence[Applied]) -> NDArray[Any]:
        events = _events(stream, history)
        if schema is None or stream.feed.member == "inputs":
            rows = np.array(events, np.float32)
        else:
            adapter = event_adapter(schema)
            parsed = [adapter.validate_python(event) for event in events]
            rows, _ = encode(schema, columns_from_events(schema, parsed), Clock())
        return oracle_step(artifact.spec, artifact.weights, rows, artifact.state.zero().floats)[0]

    return "oracle", oracle


def compare(
    load: Load, method: tuple[str, Recompute], max_streams: int, max_events: int
) -> Compared:
    """Check every stream's history, and compare the outputs of some streams.

    Faults are added to the load's results.

    Args:
        max_streams: compared at most, drawn evenly from all.
        max_events: longest beginning of a stream that is compared.
    """
    how, recompute = method
    histories = {}
    for stream in load.streams:
        history = stream.history()
        if isinstance(history, Fault):
            load.results.add_fault(history)
        elif any(each.outputs is not None for each in history):
            histories[stream] = history
    count, events, excess = 0, 0, 0.0
    for stream in load.random.sample(list(histories), min(max_streams, len(histories))):
        limit = min(max_events, _max_events(stream, load.model))
        history = [each for each in histories[stream] if each.end <= limit]
        received = [each for each in history if each.outputs is not None]
        if not received:
            continue
        wanted = np.asarray(recompute(stream, history), np.float64)
        worst, where = 0.0, 0
        for each in received:
            b = wanted[each.start : each.end]
            over = np.abs(each.outputs - b) - BOUND * np.abs(b)
            events += each.chunk.steps
            if over.size and over.max() > worst:
                worst, where = float(over.max()), each.start
        count += 1
        excess = max(excess, worst)
        if worst > BOUND:
            detail = (
                f"stream {stream.name!r}, chunk at {where}: |a-b| - 1e-5|b| is {worst:.2e}, "
                f"expected at most 1e-5, by {how}"
            )
            load.results.add_fault(Fault("wrong_outputs", detail))
    return Compared(how, count, events, excess)


def _max_events(stream: LoadStream, model: ModelDescription) -> int:
    """Events of a stream that fit into one request."""
    by_size = int(model.max_body_bytes * BODY_SHARE) // stream.feed.event_bytes
    return min(model.max_predict_steps, by_size)


def _events(stream: LoadStream, history: Sequence[Applied]) -> list[Any]:
    return [event for each in history for event in stream.feed.events(each.chunk)]
