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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from carry_client import ModelDescription, stream_path
from tests.load.feeds import longest_request
from tests.load.streams import Applied, LoadStream, Streams, WrongAnswerError
from tests.load.verdict import LoadError

Recompute = Callable[[LoadStream, Sequence[Applied]], NDArray[Any]]
"""The outputs [T, O] of a stream's first chunks, computed a second time."""

BOUND = 1e-5


class Compared(NamedTuple):
    """Outputs compared with a second computation of the same events."""

    how: str
    streams: int = 0
    events: int = 0
    excess: float = 0.0  # the largest |a-b| - 1e-5 |b|; correct up to 1e-5


def by_service(
    request: Callable[[str, Any], Any], model: ModelDescription
) -> tuple[str, Recompute]:
    """A second computation by the service itself; `request` posts a document to a path."""

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
    streams: Streams, method: tuple[str, Recompute], max_streams: int, max_events: int
) -> Compared:
    """Check every stream's history, and compare the outputs of some streams.

    Wrong answers are added to those of the streams.

    Args:
        max_streams: compared at most, drawn evenly from all.
        max_events: longest beginning of a stream that is compared.
    """
    how, recompute = method
    histories = {}
    for stream in streams.every:
        try:
            histories[stream] = stream.history()
        except WrongAnswerError as error:
            streams.add_failure(error)
    candidates = [stream for stream, history in histories.items() if history]
    count, events, excess = 0, 0, 0.0
    for stream in streams.random.sample(candidates, min(max_streams, len(candidates))):
        limit = min(max_events, longest_request(streams.model, stream.feed.event_bytes))
        history = [each for each in histories[stream] if each.end <= limit]
        received = [each for each in history if each.outputs is not None]
        if not received:
            continue
        wanted = np.asarray(recompute(stream, history), np.float64)
        count += 1
        for each in received:
            events += each.chunk.steps
            worst = _excess(each.outputs, wanted[each.start : each.end])
            excess = max(excess, worst)
            if worst > BOUND:
                detail = (
                    f"stream {stream.name!r}, chunk at {each.start}: |a-b| - 1e-5|b| is "
                    f"{worst:.2e}, expected at most 1e-5, by {how}"
                )
                streams.add_failure(WrongAnswerError("wrong_outputs", detail))
    return Compared(how, count, events, excess)


def _excess(a: Any, b: NDArray[Any]) -> float:
    excess = np.where(np.isfinite(b), np.abs(a - b) - BOUND * np.abs(b), np.inf)
    return float(np.max(excess, initial=0.0))


def _events(stream: LoadStream, history: Sequence[Applied]) -> list[Any]:
    return [event for each in history for event in stream.feed.events(each.chunk)]
