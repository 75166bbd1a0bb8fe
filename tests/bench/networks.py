"""The networks that are measured, the bodies sent to them, and the judge of their answers.

The standard workload: two stacked LSTM(64) and Dense(8), 16 features, 16 events a chunk. The
weights are contracting, so that every server's outputs must equal the float64 oracle of the
tests within the contract's 1e-5, however the events were cut and batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import ormsgpack
from numpy.typing import NDArray

from models.artifact.artifact import Artifact, write_artifact
from models.spec.model import parse_spec
from tests.bench.traffic import Kept, Media, TrafficSpec, packed_binary
from tests.support.oracle import contracting_weights, oracle_in_blocks, oracle_step

FEATURES, STEPS, UNITS = 16, 16, 64
BODIES = 8
HEADS = [{"kind": "dense", "name": "out", "units": 8}]
TOLERANCE = 1e-5
TRAINED_TOLERANCE = 1e-3
"""For weights from training, with heads that exponentiate: the contract's bound is for
contracting networks, and this judge is to find wrong answers, not the last digit."""

FloatRows = NDArray[np.float32]


def standard_model(folder: Path, units: int = UNITS) -> Artifact:
    """Write the benchmark's network as the artifact `folder/bench`."""
    spec = parse_spec(
        {
            "name": "bench",
            "features": FEATURES,
            "layers": [{"kind": "lstm", "units": units}, {"kind": "lstm", "units": units}],
            "heads": HEADS,
        }
    )
    return write_artifact(folder / "bench", spec, contracting_weights(spec, 1))


@dataclass(frozen=True)
class Bodies:
    """What the chunks hold: blocks of rows, which a stream is sent in turn.

    Attributes:
        rows: float32 [T, F] each.
        events: the same as events, written as JSON; None where the feed is `inputs`.
    """

    rows: tuple[FloatRows, ...]
    events: tuple[bytes, ...] | None = None

    @classmethod
    def random(cls, steps: int, features: int = FEATURES, count: int = BODIES) -> Bodies:
        """Blocks of `steps` random rows with four decimals."""
        random = np.random.default_rng(steps)
        blocks = random.normal(size=(count, steps, features)).round(4).astype(np.float32)
        return cls(tuple(blocks))

    def values(self, media: Media) -> tuple[bytes, ...]:
        """Each block as the member of a body."""
        if self.events is not None:
            return self.events
        if media == "msgpack":
            return tuple(packed_binary(rows.astype("<f4").tobytes()) for rows in self.rows)
        return tuple(orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY) for rows in self.rows)

    def traffic(
        self,
        prefix: str,
        streams: int,
        *,
        model: str = "bench",
        media: Media = "json",
        items: int = 0,
        **rest: Any,
    ) -> TrafficSpec:
        """What a generator sends to one server: its own streams, named by `prefix`."""
        single = f"/v1/models/{model}/streams/%b/chunks"
        return TrafficSpec(
            path=(f"/v1/models/{model}/chunks" if items else single).encode(),
            media=media,
            member="inputs" if self.events is None else "events",
            values=self.values(media),
            steps=tuple(map(len, self.rows)),
            prefix=prefix,
            streams=streams,
            items=items,
            **rest,
        )


class WrongOutputsError(Exception):
    """A server's outputs are not the network's."""


def check_answers(
    artifact: Artifact,
    spec: TrafficSpec,
    rows: Sequence[FloatRows],
    kept: Sequence[Kept],
    tolerance: float = TOLERANCE,
) -> int:
    """Hold the kept replies of streams that began in this run against the model's definition.

    That is one whole run of each stream; where the cuts count one run of each chunk, from the
    state of the one before; of a model of whole sequences one run of each, from the zero state.

    Args:
        rows: the encoded rows of each body, in a stream's own order of bodies.
        kept: replies; chunks of one stream without a gap from its first.

    Returns:
        How many events' outputs were compared.

    Raises:
        WrongOutputsError: with the largest difference.
    """
    compared = 0
    for stream in sorted({reply.stream for reply in kept}):
        replies = sorted((k for k in kept if k.stream == stream), key=lambda k: k.chunk)
        if [reply.chunk for reply in replies] != list(range(len(replies))):
            raise WrongOutputsError(f"stream {stream}: replies are missing")
        sent = [rows[spec.body(stream, reply.chunk)] for reply in replies]
        got = _outputs(artifact, spec.media, [reply.reply for reply in replies])
        hold(f"stream {stream}", got, defined(artifact, sent), tolerance)
        compared += len(got)
    return compared


def hold(
    what: str, got: NDArray[np.float64], whole: NDArray[np.float64], tolerance: float = TOLERANCE
) -> None:
    """Raise WrongOutputsError, with the largest difference, where numbers are not the oracle's."""
    if got.shape != whole.shape:
        raise WrongOutputsError(f"{what}: expected outputs {whole.shape}, got {got.shape}")
    excess = np.abs(got - whole) - tolerance * (1 + np.abs(whole))
    if not (excess <= 0).all():
        raise WrongOutputsError(
            f"{what}: the outputs differ from one whole run by up to "
            f"{np.abs(got - whole).max():.2g}, expected {tolerance:g}"
        )


def defined(artifact: Artifact, chunks: Sequence[FloatRows]) -> NDArray[np.float64]:
    """The outputs that a new stream is due for some chunks: all [T, O], or one a chunk [K, O]."""
    spec, weights, zero = artifact.spec, artifact.weights, artifact.network_state.zero().floats
    width = sum(output.size for output in artifact.outputs.outputs)
    if spec.blocks is not None:
        rows = np.concatenate(chunks)
        size, lookahead = spec.blocks.size, spec.blocks.lookahead
        due = max(0, len(rows) - lookahead) // size * size
        return oracle_in_blocks(spec, weights, rows)[:due]
    if spec.chunking == "invisible":
        return oracle_step(spec, weights, np.concatenate(chunks), zero)[0]
    found, state = [], zero.astype(np.float64)
    for rows in chunks:
        outputs, after = oracle_step(spec, weights, rows, state)
        # Behind the outputs stand the weights of attention, which replies do not show here.
        found.append(outputs[-1:, :width] if once(artifact) else outputs[:, :width])
        state = after if spec.chunking == "per_chunk" else state
    return np.concatenate(found)


def once(artifact: Artifact) -> bool:
    """Whether the outputs hold once for a whole chunk."""
    return all(output.per == "chunk" for output in artifact.outputs.outputs)


def _outputs(artifact: Artifact, media: Media, replies: Sequence[bytes]) -> NDArray[np.float64]:
    """The outputs of a stream's replies, float64 [T, O].

    Raises:
        WrongOutputsError: a reply begins elsewhere than where the one before ended.
    """
    read = orjson.loads if media == "json" else ormsgpack.unpackb
    found: list[NDArray[np.float64]] = []
    for reply in map(read, replies):
        given = sum(map(len, found))
        if reply.get("output_position", given if artifact.spec.blocks is None else None) != given:
            raise WrongOutputsError(f"expected outputs from {given} on, got {reply}")
        named = reply["predictions"][0]["outputs"] if "predictions" in reply else reply["outputs"]
        columns = []
        for output in artifact.outputs.outputs:
            values = np.asarray(named[output.name], np.float64)
            count = 1 if output.per == "chunk" else len(values)
            columns.append(values.reshape(count, output.size))
        found.append(np.concatenate(columns, axis=1))
    return np.concatenate(found)
