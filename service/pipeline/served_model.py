"""One served model: its artifact, its runtime, and the code between events and rows.

`encode` turns the steps of a chunk into network rows under the stream's present state, and
gives the integer part of the state back advanced. The float part is the runtime's. `encode_many`
does so for the chunks of a batch together; what is wrong with one of them is that one's alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.decoding.forecasts import FutureCovariates, encode_covariates
from models.errors import DataError, StateError
from models.events.encode import Clock, encode, encode_many
from models.events.schema import EventSchema
from models.spec.blocks import BlockStateLayout
from models.spec.decoder import DecoderSpec
from models.spec.layout import OutputSpec
from models.spec.state import State, StateSpec
from service.core.errors import ChunkTooLong, ForecastUnsupported, InvalidInput, StateDamaged
from service.core.values import FloatRows, ForecastRequest, Steps, StreamState
from service.engine.runtimes.base import Runtime

Encoded = tuple[FloatRows, NDArray[np.int64]]
"""Rows [T, F] of a chunk, and the int parts [M] of the state after it."""


@dataclass(frozen=True)
class ServedModel:
    """A model that is ready to serve, or becomes so once its runtime is warm."""

    artifact: Artifact
    runtime: Runtime
    decoder: Runtime | None = None

    @cached_property
    def name(self) -> str:
        """The slug in the address."""
        return self.artifact.spec.name

    @property
    def version(self) -> str:
        """The first 12 hex digits of the fingerprint."""
        return self.artifact.version

    @property
    def fingerprint(self) -> bytes:
        """What determines the model's numbers, 16 bytes."""
        return self.artifact.fingerprint

    @property
    def events(self) -> EventSchema | None:
        """The event schema; None for a model fed by `inputs` only."""
        return self.artifact.spec.events

    @cached_property
    def input_features(self) -> int:
        """F, values per row of `inputs`."""
        return self.artifact.spec.input_features

    @cached_property
    def state(self) -> StateSpec:
        """The layout of a stream's state."""
        return self.artifact.state

    @cached_property
    def blocks(self) -> BlockStateLayout | None:
        """The parts of the state that hold what waits, for a model with blocks."""
        spec = self.artifact.spec.blocks
        return None if spec is None else BlockStateLayout(spec, self.state)

    @cached_property
    def outputs(self) -> OutputSpec:
        """The layout of one step's outputs."""
        return self.artifact.outputs

    @cached_property
    def chunk_limit(self) -> int | None:
        """Most steps of one chunk; None where a chunk may be cut anywhere."""
        return self.artifact.spec.chunk_limit

    def check_length(self, steps: Steps) -> None:
        """Refuse what cannot be one call of a network that sees a chunk as a whole.

        Raises:
            ChunkTooLong
        """
        if self.chunk_limit is not None and steps.length > self.chunk_limit:
            raise ChunkTooLong(
                f"expected at most {self.chunk_limit} steps, the max_chunk_steps of model "
                f"{self.name!r}, which sees a chunk as a whole; got {steps.length}",
                expected=self.chunk_limit,
                got=steps.length,
            )

    def encode_covariates(self, request: ForecastRequest, state: State) -> FutureCovariates:
        """What is known of the steps that follow a state, encoded.

        Raises:
            InvalidInput: something is not known that has to be.
            StateDamaged: the state's clock is one that no stream can have.
        """
        try:
            clock = Clock.from_ints(self.state, state.ints)
            return encode_covariates(self.artifact.spec, clock, request.horizon, request.future)
        except DataError as error:
            raise invalid_data("future", error) from error
        except StateError as error:
            raise StateDamaged(f"the stored state cannot be continued: {error}") from error

    def require_decoder(self) -> DecoderSpec:
        """The model's decoder.

        Raises:
            ForecastUnsupported: it has none.
        """
        decoder = self.artifact.spec.decoder
        if decoder is None:
            raise ForecastUnsupported(
                f"model {self.name!r} has no decoder, so its streams cannot be forecast"
            )
        return decoder

    def is_compatible(self, stored: StreamState) -> bool:
        """Whether this version of the model wrote the state."""
        state = stored.state
        return (
            stored.fingerprint == self.fingerprint
            and state.floats.size == self.state.float_size
            and state.ints.size == self.state.int_size
        )

    def encode(self, steps: Steps, state: State) -> Encoded:
        """Rows [T, F] of a chunk that continues `state`, and the int parts [M] after it.

        Raises:
            ChunkTooLong: as `check_length`.
            InvalidInput: a value cannot be encoded (it overflows float32, say).
            StateDamaged: the state's clock is one that no stream can have.
        """
        self.check_length(steps)
        if steps.rows is not None:
            return steps.rows, state.ints
        if steps.columns is None or self.events is None:
            raise InvalidInput(f"model {self.name!r} has no event schema; send `inputs`")
        try:
            clock = Clock.from_ints(self.state, state.ints)
            rows, clock = encode(self.events, steps.columns, clock)
        except DataError as error:
            raise invalid_data("events", error) from error
        except StateError as error:
            raise StateDamaged(f"the stored state cannot be continued: {error}") from error
        return rows, clock.into_ints(self.state, state.ints)

    def encode_many(self, items: Sequence[tuple[Steps, State]]) -> list[Encoded | Exception]:
        """As `encode` for chunks of different streams, in a fraction of its time for each.

        Returns:
            In the order of the items: what `encode` returns for it, or the exception, raised
            by that item alone. The rows of several chunks are views of one array.
        """
        given = [(steps, state) for steps, state in items if steps.rows is None]
        whole = self.chunk_limit is not None
        together = self._encoded_together(given) if len(given) > 1 and not whole else None
        found: list[Encoded | Exception] = []
        for steps, state in items:
            if steps.rows is not None and not whole:
                found.append((steps.rows, state.ints))
            elif together is not None:
                found.append(next(together))
            else:
                found.append(self._encoded_alone(steps, state))
        return found

    def _encoded_alone(self, steps: Steps, state: State) -> Encoded | Exception:
        try:
            return self.encode(steps, state)
        except Exception as error:
            return error

    def _encoded_together(self, items: Sequence[tuple[Steps, State]]) -> Iterator[Encoded] | None:
        """Chunks of events at once; None where any of them fails."""
        columns = [steps.columns for steps, _ in items if steps.columns is not None]
        if self.events is None or len(columns) < len(items):
            return None
        layout = self.state
        try:
            clocks = [Clock.from_ints(layout, state.ints) for _, state in items]
            rows, after = encode_many(self.events, columns, clocks)
        except Exception:
            # Whichever chunk it is, one by one it fails alone.
            return None
        ints = [
            clock.into_ints(layout, state.ints)
            for clock, (_, state) in zip(after, items, strict=True)
        ]
        return zip(rows, ints, strict=True)


def invalid_data(feed: str, error: DataError) -> InvalidInput:
    """The refusal of data, with the place in the body: `events[3].dep_delay`."""
    place = feed
    if error.index is not None:
        place += f"[{error.index}]"
    if error.field is not None:
        place += f".{error.field}"
    return InvalidInput(
        f"{place}: expected {error.expected}, got {error.got}",
        at=place,
        expected=error.expected,
        got=error.got,
    )
