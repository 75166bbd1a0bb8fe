"""A stream of the client: `Stream`.

It only drives the calls of `streams.py`. `aio_stream.py`, the same for an event loop, is generated
from this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from carry_client.replies import (
    Forecast,
    Reply,
    StreamHistory,
    StreamInfo,
    StreamState,
)
from carry_client.steps import sort_frame
from carry_client.streams import StreamCore
from carry_client.sync_driver import Driver
from carry_client.types import Events, Head, Progress, Source
from carry_client.wire import reply_params


class Stream:
    """A stream of a model, which one thread or task uses at a time.

    Attributes:
        name: its name.
    """

    def __init__(self, driver: Driver, core: StreamCore) -> None:
        self._driver, self._core = driver, core
        self.name = core.name

    @property
    def head(self) -> Head | None:
        """Position, epoch and tag after the last reply; None before the first request."""
        return self._core.head

    @property
    def position(self) -> int:
        """How many events the service has applied, as far as is known; 0 before that."""
        return self._core.head_position

    def refresh(self) -> Head:
        """Read the head from the service, and continue from there, whatever came before.

        Raises:
            Problem
        """
        return self._driver.run(self._core.refresh())

    def send(
        self,
        events: Events,
        *,
        final: bool = False,
        resets: Sequence[int] = (),
        return_sequences: bool = True,
        return_state: bool = False,
        return_attention: bool = False,
    ) -> Reply:
        """Send one chunk of T events after those before, applied once; returns their outputs.

        Args:
            events: a list of events, a dict of columns, a DataFrame, or rows [T, F] of encoded
                values. Times are epoch milliseconds, RFC 3339 strings or aware datetimes.
            final: no event follows, for a model with blocks.
            resets: ascending indexes of the events before which the state is reset to the
                model's initial state; an event may also have `reset=True`.
            return_sequences: outputs of every event, [T, ...]; otherwise of the last alone, [...].
            return_state: the reply has the state after the last event.
            return_attention: the reply has the weights of layers that attend over the chunk.

        Raises:
            InvalidInput, ChunkTooLong: the events do not fit the model; nothing was applied.
            AlreadyApplied: it was applied, but the reply was lost and is no longer stored.
            StreamRolledBack, StreamDiverged: see `Model.stream`.
            Problem: any other; the same call may be repeated if it is retryable.
            ValueError, TypeError: the arguments are no events.
        """
        params = reply_params(return_sequences, return_state, return_attention)
        return self._driver.run(self._core.send(events, params, is_final=final, resets=resets))

    def dry_run(
        self,
        events: Events,
        *,
        resets: Sequence[int] = (),
        return_sequences: bool = True,
        return_state: bool = False,
        return_attention: bool = False,
    ) -> Reply:
        """Compute the chunk that `send` would apply now; nothing is applied or created.

        Args:
            events, resets, return_sequences, return_state, return_attention: as for `send`.

        Returns:
            The reply, with the current stream head.

        Raises:
            InvalidInput, ChunkTooLong: as `send`.
            StateChanged, PositionAhead: the stream is elsewhere than this client left it.
            Problem
        """
        params = reply_params(return_sequences, return_state, return_attention)
        return self._driver.run(self._core.dry_run(events, params, resets=resets))

    def send_all(
        self,
        source: Source,
        *,
        sort_by: str | None = None,
        chunk_events: int | None = None,
        linger_s: float | None = None,
        first_position: int | None = 0,
        final: bool = False,
        resets: Sequence[int] = (),
        progress: Callable[[Progress], None] | None = None,
        return_sequences: bool = True,
        return_state: bool = False,
        return_attention: bool = False,
    ) -> Iterator[Reply]:
        """Send all events of a source in chunks; yields the reply of each.

        Failures are retried and rollbacks answered meanwhile; each event's outputs are yielded
        once. Events that the service has applied before are skipped, so that a second run resumes
        where the first stopped. Nothing is sent until the result is iterated over.

        Args:
            source: all events in order, as `send` takes them, or an iterable of events or blocks.
            sort_by: the column by which a DataFrame is sorted first, such as its time.
            chunk_events: events of a chunk, 256 by default.
            linger_s: send fewer if the oldest event has waited this long, in seconds. In an event
                loop this needs an asynchronous source.
            first_position: the position of the source's first event; None: the source continues
                the stream.
            final: end the stream after the last event, for a model with blocks.
            resets: indexes of the source's events before which the state is reset.
            progress: called after each chunk.
            return_sequences, return_state, return_attention: as for `send`.

        Raises:
            errors.PositionAhead: `first_position` is beyond the stream's position.
            StreamRolledBack, StreamDiverged, Problem: as `send`.
            ValueError: the source is shorter than the stream, or it has no events.
        """
        calls = self._core.send_all(
            source if sort_by is None else sort_frame(source, sort_by),
            reply_params(return_sequences, return_state, return_attention),
            chunk_events=chunk_events,
            linger_s=linger_s,
            first_position=first_position,
            is_final=final,
            resets=resets,
            progress=progress,
        )
        yield from self._driver.iterate(calls)

    def info(self) -> StreamInfo:
        """The stream's head, model version, age and size, read from the service.

        Raises:
            StreamNotFound, Problem
        """
        return self._driver.run(self._core.info())

    def forecast(
        self, horizon: int, *, samples: int = 0, seed: int = 0, future: Events | None = None
    ) -> Forecast:
        """Forecast H = `horizon` steps from the stream's current state, which does not change.

        Args:
            samples: S, how many paths to draw; the same seed draws the same paths.
            future: H events with the known future fields of the model.

        Raises:
            ForecastUnsupported, StreamNotFound, InvalidInput, Problem
        """
        return self._driver.run(
            self._core.forecast(horizon, samples=samples, seed=seed, future=future)
        )

    def state(self) -> StreamState:
        """The complete state, by name, with everything that restores it.

        Raises:
            StreamNotFound, StateIncompatible, Problem
        """
        return self._driver.run(self._core.state())

    def restore(self, state: StreamState, *, overwrite: bool = False) -> Head:
        """Put a state, of this stream or another, in this one's place, and continue from there.

        Raises:
            StreamExists: without `overwrite`.
            StateIncompatible, InvalidInput, Problem
        """
        return self._driver.run(self._core.restore(state, overwrite=overwrite))

    def fork(self, to: Stream, *, overwrite: bool = False) -> None:
        """Create the stream `to` from this one's current state; then both are independent.

        Raises:
            StreamExists: without `overwrite`.
            StreamNotFound, Problem
        """
        self._driver.run(self._core.fork(to._core, overwrite=overwrite))

    def history(self, start: int = 0, limit: int | None = None) -> StreamHistory:
        """What the service keeps of the stream's past: its events from `start` on, at most `limit`.

        Raises:
            StreamNotFound, Problem
        """
        return self._driver.run(self._core.history(start, limit))

    def rewind(self, position: int) -> Head:
        """Take the stream back to an earlier position, in a new epoch, and continue from there.

        Raises:
            PositionUnavailable: no exact state is kept; `document["available"]` has the positions.
            StateChanged: the stream is elsewhere than this client left it.
            StreamNotFound, StreamDiverged, Problem
        """
        return self._driver.run(self._core.rewind(position))

    def acknowledge(self, position: int | None = None) -> bool:
        """Close the open alarm of the stream, and take what it does now as normal.

        Clients that send chunks do not notice.

        Args:
            position: only if the stream is at this position.

        Returns:
            Whether an alarm was open; False also if an earlier attempt, whose reply was lost,
            closed it.

        Raises:
            PositionAhead, PositionBehind, StreamNotFound, Problem
        """
        return self._driver.run(self._core.acknowledge(position))

    def delete(self) -> bool:
        """Delete the stream, its state and its stored reply; returns whether it existed.

        Raises:
            Problem
        """
        return self._driver.run(self._core.delete())
