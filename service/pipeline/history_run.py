"""Runs a version of a model over recent events of streams: their states later on, no outputs.

Events are encoded and computed as they would be in a batch: resets, blocks, running statistics and
detection included. Where the network does not see a chunk as a whole, neighbouring chunks are
joined (`decode_entries`) and long ones cut, so that a call has about the same size whatever was
sent together; the state is the same. Streams are advanced side by side, a few at a time, in short
calls between which other batches run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import structlog

from models.spec.state import State
from service.core.errors import CarryError, InternalError, NotFinite
from service.engine.compute import Compute, OnCall, TimeSlicer, ignore_call
from service.pipeline.inference import infer_batch
from service.pipeline.served_model import Segment, ServedModel
from service.store.history_codec import HistoryEntry
from service.store.layout import CodecError

PIECE_STEPS: Final = 64
"""Most steps of one call, for each of its streams."""

PIECE_ROWS: Final = 16
"""Most streams in one call."""

log = structlog.get_logger(__name__)


class HistoryGap(Exception):
    """The history does not lead from one position to the other; the message gives the reason."""


class HistoryRun(NamedTuple):
    """A state of a stream, and what follows it.

    Attributes:
        position: of the stream in this state.
        entries: consecutive, each of them used once; what is before `position` or after `until` is
            left out.
        until: the position to advance to.
    """

    state: State
    position: int
    entries: Iterable[HistoryEntry]
    until: int


class Advanced(NamedTuple):
    """The state at the end of a run.

    Attributes:
        was_reset: whether it was reset on the way by the client or by `reset_every`, so that it
            does not depend on the state before the run. A session gap may follow from a clock that
            has not seen the stream's start, and does not count.
    """

    state: State
    was_reset: bool


async def advance_many(
    served: ServedModel,
    compute: Compute,
    runs: Sequence[HistoryRun],
    on_call: OnCall | None = None,
) -> list[Advanced | CarryError | HistoryGap]:
    """Advance streams; each may fail by itself.

    Returns:
        Of each its state, a HistoryGap if the entries are not those from one position to the
        other, or the error of events that the model cannot encode, or of numbers that are not
        finite.
    """
    slicer = TimeSlicer(compute)
    results: list[Advanced | CarryError | HistoryGap] = []
    rows = min(PIECE_ROWS, served.runtime.max_batch)
    for first in range(0, len(runs), rows):
        group = runs[first : first + rows]
        results += await _Group(served, compute, group, on_call or ignore_call, slicer).advance()
    return results


class _Group:
    """Runs that are computed side by side, one piece of each at a time."""

    def __init__(
        self,
        served: ServedModel,
        compute: Compute,
        runs: Sequence[HistoryRun],
        on_call: OnCall,
        slicer: TimeSlicer,
    ):
        self._served = served
        self._compute = compute
        self._on_call = on_call
        self._slicer = slicer
        self._results: list[Advanced | CarryError | HistoryGap] = []
        self._pieces: list[Iterator[HistoryEntry]] = []
        for run in runs:
            self._results.append(Advanced(run.state, was_reset=False))
            self._pieces.append(_pieces(run, cuts=served.chunk_limit is None))

    async def advance(self) -> list[Advanced | CarryError | HistoryGap]:
        """Compute all pieces, those of a stream one after another."""
        active = list(range(len(self._pieces)))
        while True:
            encoded: dict[int, list[Segment]] = {}
            for at in active:
                if part := self._encode_next(at):
                    encoded[at] = part
                await self._slicer.yield_if_long()
            if not encoded:
                return self._results
            await self._compute_parts(encoded)
            active = [at for at in encoded if isinstance(self._results[at], Advanced)]

    def _encode_next(self, at: int) -> list[Segment]:
        """The encoded segments of a stream's next piece; none if it has none, or failed."""
        result = self._results[at]
        try:
            piece = next(self._pieces[at], None)
            if piece is None or not isinstance(result, Advanced):
                return []
            served, steps = self._served, piece.steps
            served.check_codes(steps)
            resets = served.find_resets(steps, result.state, piece.start)
            segments = served.encode_segments(steps, result.state, resets)
        except (CarryError, HistoryGap) as error:
            self._results[at] = error
            return []
        except CodecError as error:
            self._results[at] = HistoryGap(str(error))
            return []
        except Exception as error:
            log.error("encoding_failed", model=self._served.name, exc_info=error)
            self._results[at] = InternalError(f"encoding failed: {type(error).__name__}")
            return []
        if served.is_reset(steps, piece.start):
            self._results[at] = result._replace(was_reset=True)
        # only the state after the last segment counts, and it follows from that segment alone
        return [segments[-1]._replace(final=piece.final)]

    async def _compute_parts(self, encoded: dict[int, list[Segment]]) -> None:
        """Compute one segment of each stream, and keep the states after them."""
        await self._slicer.yield_to_others()
        parts = [segment for part in encoded.values() for segment in part]
        output = await infer_batch(self._compute, self._served, parts, self._on_call, is_slice=True)
        for at, state in zip(encoded, map(State, *output.states), strict=True):
            result = self._results[at]
            if not output.finite and not self._served.state.is_finite(state):
                self._results[at] = NotFinite("expected a finite state, got NaN or infinity")
            elif isinstance(result, Advanced):
                # a copy: a view would keep the states of the whole call
                state = State(state.floats.copy(), state.ints.copy())
                self._results[at] = result._replace(state=state)


def decode_entries(served: ServedModel, values: Iterable[bytes]) -> Iterator[HistoryEntry]:
    """The entries of a stream for `HistoryRun`, decoded as they are used; joined, unless the
    network sees each chunk as a whole. Raises CodecError."""
    codec = served.history_codec
    if served.chunk_limit is not None:
        return map(codec.decode, values)
    return codec.decode_joined(values, PIECE_STEPS)


def _pieces(run: HistoryRun, *, cuts: bool) -> Iterator[HistoryEntry]:
    """The events of a run from its position to its end, one call each.

    Args:
        cuts: whether chunks may be cut; otherwise each is a piece.
    """
    for entry in _entries_between(run, cuts=cuts):
        yield from _cut(entry) if cuts else (entry,)


def _entries_between(run: HistoryRun, *, cuts: bool) -> Iterator[HistoryEntry]:
    """The entries between both positions of a run, the first and the last cut to them."""
    at = run.position
    for entry in run.entries:
        start, stop = entry.start, entry.stop
        if start > run.until:
            break
        if stop < at or (start < stop and at in (stop, run.until)):
            continue
        if start > at or (not cuts and (start < at or stop > run.until)):
            raise HistoryGap(
                f"expected events from position {at}, got a chunk of {start} to {stop}"
            )
        if start < at or stop > run.until:
            entry = entry.cut(at, min(stop, run.until))
        yield entry
        at = entry.stop
    if at != run.until:
        raise HistoryGap(f"expected events up to position {run.until}, got them up to {at}")


def _cut(entry: HistoryEntry) -> Iterator[HistoryEntry]:
    if entry.steps.length <= PIECE_STEPS:
        yield entry
        return
    for start in range(entry.start, entry.stop, PIECE_STEPS):
        yield entry.cut(start, min(start + PIECE_STEPS, entry.stop))
