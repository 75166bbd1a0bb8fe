"""One served model: its artifact, its runtimes, and the encoding of events into network rows.

`encode` turns the events of a chunk into network rows, given the stream's current state, and
returns the next integer part of the state; the float part comes from the runtime. `encode_many`
encodes the chunks of a batch together, with an outcome for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.decoding.forecasts import FutureCovariates, encode_covariates
from models.detection.alarms import acknowledge_alarm
from models.detection.causes import Alarm, Causes
from models.errors import DataError, StateError
from models.events.encode import Clock, encode, encode_many, event_times
from models.events.values import check_rows
from models.spec.blocks import BlockStateLayout
from models.spec.decoder import DecoderSpec
from models.spec.detection import ALARM_RATE
from models.spec.history import HistorySpec
from models.spec.resets import find_resets, segments_of
from models.spec.state import State
from service.core.delivery import stream_facts
from service.core.errors import (
    ChunkTooLong,
    ForecastUnsupported,
    InvalidInput,
    StateDamaged,
    StateIncompatible,
)
from service.core.values import (
    Chunk,
    FloatRows,
    ForecastRequest,
    Steps,
    StreamHead,
    StreamState,
    Warmth,
)
from service.engine.runtimes.base import Runtime
from service.store.history_codec import HistoryCodec
from service.store.layout import HEADER_BYTES

Encoded = tuple[FloatRows, NDArray[np.int64]]
"""Rows [T, F] of a chunk, and the int part [M] of the state after it."""

MIN_RATE: Final = float(np.finfo(np.float32).tiny)
"""Smallest rate of false alarms in a state: a smaller one would be 0 there, the model's own."""


class Segment(NamedTuple):
    """Encoded steps without a reset in between.

    Attributes:
        state: the state before them: the stream's, or after a reset the initial one.
        rows: float32 [t, F].
        ints: int64 [M], the int part of the state after them; in a chunk with resets only that of
            the last segment, whose state is kept; without the part of the blocks.
        final: for a model with blocks, whether no event follows.
    """

    state: State
    rows: FloatRows
    ints: NDArray[np.int64]
    final: bool = True


class AlarmLayout(NamedTuple):
    """Where the alarms of a model are.

    Attributes:
        sign_at: the byte of an encoded state that is at least 128 if an alarm is open.
        column: of the outputs.
    """

    sign_at: int
    column: int


class ServedModel:
    """A model that is ready to serve once its runtimes are warm.

    Attributes:
        name: in URLs.
        version: the first 12 hex digits of the fingerprint.
        fingerprint: hash of everything that determines the model's outputs, 16 bytes.
        events: the event schema; None for a model that takes `inputs` only.
        input_features: F, values per row of `inputs`.
        outputs: the layout of one step's outputs.
        chunk_limit: maximum steps of one chunk; None if a chunk may be split anywhere.
        state: the layout of a stream's state.
        state_bytes: the size of a stream's state in the store, with what its history has at most.
        initial: the state of a stream before its first event, and after a reset; not to be
            modified.
        runtime_state: the layout of the parts that the runtime reads and writes.
        blocks: the parts of the state that hold waiting rows; None for a model without blocks.
        alarm: where alarms are; None for a model without detection.
        history: what the store keeps of a stream besides its state; None for nothing.
        history_codec: encodes and decodes the entries of a history.
        is_warm: whether its runtimes are warm.
        warm_events: after how many events a state that began as the initial one counts as exact:
            the burn-in, or if that is not known the events of the history.
    """

    def __init__(
        self,
        artifact: Artifact,
        runtime: Runtime,
        decoder: Runtime | None = None,
        history: HistorySpec | None = None,
    ):
        self.artifact = artifact
        self.is_warm = False
        self.runtime = runtime
        self.decoder = decoder
        self.spec = spec = artifact.spec
        self.name = spec.name
        self.version = artifact.version
        self.fingerprint = artifact.fingerprint
        self.events = spec.events
        self.input_features = spec.input_features
        self.outputs = artifact.outputs
        self.chunk_limit = spec.chunk_limit
        self.state = layout = artifact.state
        self.state_bytes = HEADER_BYTES + 4 * layout.float_size + 8 * layout.int_size
        self.initial = layout.initial()
        self.runtime_state = artifact.runtime_state
        self.blocks = None if spec.blocks is None else BlockStateLayout(spec.blocks, layout)
        self.history = history
        self.warm_events = artifact.burn_in or (history.events if history else 0)
        self.history_codec = HistoryCodec(spec.events, spec.input_features)
        if history is not None:
            self.state_bytes *= 1 + history.snapshots
            self.state_bytes += self.history_codec.estimate_bytes(history.events)
        detection = spec.detection
        self.alarm: AlarmLayout | None = None
        self._alarm_at: int | None = None
        self._alarm_rate_at: int | None = None
        self._causes: Causes | None = None
        if detection is not None:
            head = detection.head
            self._causes = Causes(spec)
            self._alarm_at = layout.slices[f"{head}.alarm"].start
            self._alarm_rate_at = layout.slices[f"{head}.{ALARM_RATE}"].start
            # the byte with the sign of a float32
            sign_at = HEADER_BYTES + 8 * layout.int_size + 4 * self._alarm_at + 3
            self.alarm = AlarmLayout(sign_at, self.outputs.slices[f"{head}.alarm"].start)

    def warm(self) -> None:
        """Warm the runtimes up; once, before use."""
        self.runtime.warm()
        if self.decoder is not None:
            self.decoder.warm()
        self.is_warm = True

    def check_codes(self, steps: Steps) -> None:
        """Reject encoded rows with a category that this version does not have.

        Raises:
            InvalidInput
        """
        if steps.rows is not None:
            try:
                check_rows(self.spec.columns, steps.rows)
            except DataError as error:
                raise invalid_data("inputs", error) from error

    def check_length(self, steps: Steps) -> None:
        """Reject a chunk that is too long for a network that sees each chunk as a whole.

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

    def check_carries_state(self, at: str) -> None:
        """Reject a state token, or a request for one, if no sequence can continue another.

        Raises:
            InvalidInput
        """
        if self.spec.chunking == "whole" or self.blocks is not None:
            raise InvalidInput(
                f"{at}: expected none, since model {self.name!r} computes each sequence to its "
                "end, and no other continues it",
                at=at,
                expected="none",
            )

    def states_before(self, steps: Sequence[Steps], states: State) -> State:
        """The states that chunks continue, with the rates that their alarms follow.

        Args:
            states: float32 [B, N] and int64 [B, M], the streams' or the initial one after a reset;
                not modified.
        """
        at = self._alarm_rate_at
        if at is None:
            return states
        given = [each.false_alarms_per_day for each in steps]
        if not any(given) and not np.count_nonzero(states.floats[:, at]):
            return states
        rates = np.array([0.0 if r is None else max(r, MIN_RATE) for r in given], np.float32)
        if (states.floats[:, at] == rates).all():
            return states
        floats = states.floats.copy()
        floats[:, at] = rates
        return State(floats, states.ints)

    def has_open_alarm(self, state: State) -> bool:
        """Whether a stream with this state has an open alarm."""
        return self._alarm_at is not None and bool(state.floats[self._alarm_at] < 0)

    def read_alarm(self, state: State) -> Alarm | None:
        """What a state says of the stream's latest alarm; None if the model keeps no record."""
        return None if self._causes is None else self._causes.of_state(state.floats)

    def acknowledge_alarm(self, state: State) -> State:
        """The state after an acknowledgement of its alarm."""
        return State(acknowledge_alarm(self.spec, state.floats), state.ints)

    def _state_before(self, steps: Steps, state: State) -> State:
        if self._alarm_rate_at is None:
            return state
        floats, ints = self.states_before([steps], State(state.floats[np.newaxis], state.ints))
        return State(floats[0], ints)

    def encode_covariates(self, request: ForecastRequest, state: State) -> FutureCovariates:
        """Encode the known future covariates of a forecast from `state`.

        Raises:
            InvalidInput: a covariate is missing, or a timestamp is wrong.
            StateDamaged: the state holds an impossible clock.
        """
        clock = self._clock(state)
        try:
            return encode_covariates(self.spec, clock, request.horizon, request.future)
        except DataError as error:
            raise invalid_data("future", error) from error

    def require_decoder(self) -> DecoderSpec:
        """The model's decoder.

        Raises:
            ForecastUnsupported: it has none.
        """
        decoder = self.spec.decoder
        if decoder is None:
            raise ForecastUnsupported(
                f"model {self.name!r} has no decoder, so its streams cannot be forecast"
            )
        return decoder

    def check_horizon(self, horizon: int) -> None:
        """Check that the model forecasts so far ahead.

        Args:
            horizon: in steps.

        Raises:
            ForecastUnsupported: it has no decoder.
            InvalidInput: the horizon is too long.
        """
        max_horizon = self.require_decoder().max_horizon
        if horizon > max_horizon:
            raise InvalidInput(
                f"horizon: expected at most {max_horizon} steps, the max_horizon of model "
                f"{self.name!r}, got {horizon}",
                at="horizon",
                expected=max_horizon,
                got=horizon,
            )

    def is_compatible(self, stored: StreamState) -> bool:
        """Whether this version of the model wrote the stored state."""
        return stored.fingerprint == self.fingerprint and self.fits(stored)

    def fits(self, stored: StreamState) -> bool:
        """Whether the stored state has as many values as this version's."""
        layout, (floats, ints) = self.state, stored.state
        return (floats.size, ints.size) == (layout.float_size, layout.int_size)

    def shares_states(self, other: ServedModel) -> bool:
        """Whether the states and the encoding of events are laid out as another version's."""
        return self.state.parts == other.state.parts and self.events == other.events

    def incompatible(self, stream: str, stored: StreamState, reason: str = "") -> StateIncompatible:
        """The error for a state that another version of the model wrote.

        Args:
            reason: why it is of no use for this version; empty if that was not tried.
        """
        return StateIncompatible(
            f"stream {stream!r} has a state of fingerprint {stored.fingerprint.hex()}, expected "
            f"{self.fingerprint.hex()} of the served version {self.version}"
            + (f"; {reason}" if reason else ""),
            expected=self.fingerprint.hex(),
            got=stored.fingerprint.hex(),
            **stream_facts(stream, stored.head),
        )

    def warmth(self, since: int | None, position: int) -> Warmth | None:
        """How warm a state is that is computed since a position; None if it is exact, or if its
        start is forgotten.

        If it is not known after how many events that is, it never counts as forgotten.
        """
        if since is None:
            return None
        events, enough = position - since, self.warm_events
        return None if enough and events >= enough else Warmth(events, enough)

    def find_since(self, since: int | None, position: int, *, was_reset: bool) -> int | None:
        """The position since which a state at a later position is computed; None if it is exact
        by then.

        Args:
            since: the same of the state from which it was computed.
            was_reset: whether it was certainly reset on the way, as by `is_reset`.
        """
        return None if was_reset or self.warmth(since, position) is None else since

    def is_reset(self, steps: Steps, position: int) -> bool:
        """Whether the state is certainly reset within a chunk: by the client or by `reset_every`.

        A session gap does not count: a clock that has not seen the start of the stream may take
        for one what is none.
        """
        every = self.spec.resets.every
        return bool(steps.resets) or (every is not None and -position % every < steps.length)

    def output_position(self, chunk: Chunk, after: StreamHead) -> int | None:
        """Index of the event of a chunk's first output, for a model with blocks; else None.

        Args:
            after: the stream head after the chunk.
        """
        if self.blocks is None:
            return None
        return self.blocks.blocks.outputs_emitted_at(after.position - chunk.steps.length)

    def encode(self, steps: Steps, state: State, resets: Sequence[int] = ()) -> Encoded:
        """Encode a chunk that continues `state`.

        Args:
            resets: ascending indexes of the events before which the state is reset.

        Raises:
            ChunkTooLong: as `check_length`.
            InvalidInput: a value cannot be encoded; it overflows float32, for example.
            StateDamaged: the state holds an impossible clock.
        """
        self.check_length(steps)
        ints = self.initial.ints if resets else state.ints
        if steps.rows is not None:
            return steps.rows, ints
        if steps.columns is None or self.events is None:
            raise InvalidInput(f"model {self.name!r} has no event schema; send `inputs`")
        try:
            rows, clock = encode(self.events, steps.columns, self._clock(state), resets)
        except DataError as error:
            raise invalid_data("events", error) from error
        return rows, clock.into_ints(self.state, ints)

    def find_resets(self, steps: Steps, state: State, position: int) -> tuple[int, ...]:
        """Where the state is reset within a chunk: by the client's resets, and by the model's
        `reset_every` and `session_gap_s`.

        Args:
            state: the stream's state before the chunk.
            position: the stream's position before the chunk.

        Raises:
            StateDamaged: the state holds an impossible clock.
        """
        policy = self.spec.resets
        if not policy.is_active:
            return steps.resets
        times = None
        if policy.session_gap_ms is not None and steps.columns is not None and self.events:
            times = event_times(self.events, steps.columns, self._clock(state))
        return find_resets(policy, steps.length, position, steps.resets, times)

    def encode_segments(self, steps: Steps, state: State, resets: Sequence[int]) -> list[Segment]:
        """Encode a chunk that continues `state`, cut at its resets.

        Args:
            resets: ascending indexes of the events before which the state is reset.

        Raises:
            ChunkTooLong, InvalidInput, StateDamaged: as `encode`.
        """
        rows, ints = self.encode(steps, state, resets)
        initial = self._state_before(steps, self.initial)
        state = self._state_before(steps, state)
        cuts = segments_of(steps.length, resets)
        states = [initial] * len(cuts)
        if not resets or resets[0] > 0:
            states[0] = state
        segments = [
            Segment(before, rows[start:stop], before.ints)
            for before, (start, stop) in zip(states, cuts, strict=True)
        ]
        segments[-1] = segments[-1]._replace(ints=ints)
        return segments

    def _clock(self, state: State) -> Clock:
        try:
            return Clock.from_ints(self.state, state.ints)
        except StateError as error:
            raise StateDamaged(f"the stored state cannot be continued: {error}") from error

    def encode_many(self, items: Sequence[tuple[Steps, State]]) -> list[Encoded | Exception]:
        """Encode chunks of different streams together, at a fraction of the cost of each alone.

        Returns:
            In the order of the items: what `encode` returns, or the exception that it raises for
            this item. The rows of several chunks are views of one array.
        """
        is_whole = self.chunk_limit is not None
        event_items = [(steps, state) for steps, state in items if steps.rows is None]
        together = None
        if len(event_items) > 1 and not is_whole:
            together = self._encode_together(event_items)
        encoded: list[Encoded | Exception] = []
        for steps, state in items:
            if steps.rows is not None and not is_whole:
                encoded.append((steps.rows, state.ints))
            elif together is not None:
                encoded.append(next(together))
            else:
                try:
                    encoded.append(self.encode(steps, state))
                except Exception as error:
                    encoded.append(error)
        return encoded

    def _encode_together(self, items: Sequence[tuple[Steps, State]]) -> Iterator[Encoded] | None:
        """Encode chunks of events at once; None if any of them fails."""
        columns = [steps.columns for steps, _ in items if steps.columns is not None]
        if self.events is None or len(columns) < len(items):
            return None
        layout = self.state
        try:
            clocks = [Clock.from_ints(layout, state.ints) for _, state in items]
            rows, after = encode_many(self.events, columns, clocks)
        except Exception:
            # encoded one by one, only the chunk that caused this fails
            return None
        ints = [
            clock.into_ints(layout, state.ints)
            for clock, (_, state) in zip(after, items, strict=True)
        ]
        return zip(rows, ints, strict=True)


def invalid_data(feed: str, error: DataError) -> InvalidInput:
    """The error for data that does not fit, with its place in the body: `events[3].dep_delay`."""
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
