"""Between bytes and the values of the pipeline, for one model.

In: a body becomes chunks or sequences, checked as far as they can be without a stream. Out: a
reply becomes plain data of NumPy arrays, which `media.dumps` writes. Nothing is looked up in a
store here and nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import DataError
from models.events.columns import EventColumns, columns_from_events
from models.events.encode import check_rows
from models.state import State
from service.api.bodies import (
    ChunkBody,
    ForecastBody,
    ItemBody,
    ModelBodies,
    StepsBody,
    coming_schema,
)
from service.api.invalid import shown
from service.api.json_rows import RowsBody
from service.api.limits import ApiLimits
from service.api.media import Media, dumps, loads
from service.api.plain import PlainBodies, PlainChunk
from service.api.reading import parse_if_match, stream_name
from service.delivery import chunk_digest, new_nonce
from service.domain import (
    Chunk,
    Feed,
    FloatRows,
    ForecastReply,
    ForecastRequest,
    Precondition,
    Prediction,
    Reply,
    Steps,
    StreamKey,
)
from service.errors import (
    CarryError,
    ChunksUnsupported,
    ChunkTooLong,
    FinalUnsupported,
    InvalidInput,
)
from service.served import ServedModel, invalid_data

NAMED_COLUMNS = 8
"""How many columns an error names before it says `...`."""


class _Most(NamedTuple):
    """A limit on steps, and what clients and operators know it as."""

    steps: int
    name: str


@dataclass(frozen=True, slots=True)
class ReplyOptions:
    """What a reply holds, under Keras' names.

    Attributes:
        return_sequences: the outputs of every step; otherwise of the last one alone, without
            the axis of time.
        return_state: the state after the chunk as well.
        return_attention: the weights of attention over the chunk as well.
    """

    return_sequences: bool = True
    return_state: bool = False
    return_attention: bool = False


_EVERY_STEP = ReplyOptions()
_ENDS = {
    (False, False): b'"replayed":false}',
    (True, False): b'"replayed":true}',
    (False, True): b'"replayed":false,"created":true}',
    (True, True): b'"replayed":true,"created":true}',
}


class ModelWire:
    """Reads the requests for one model and writes its replies.

    Args:
        nonce: gives the random bytes of an append.
    """

    def __init__(
        self, served: ServedModel, limits: ApiLimits, nonce: Callable[[], bytes] = new_nonce
    ):
        self.served = served
        limits = limits.of_model(served.chunk_limit)
        self.bodies = ModelBodies(served, limits)
        self._plain = PlainBodies(served, limits)
        self._limits = limits
        self._most_chunk = _Most(limits.max_chunk_steps, "max_chunk_steps")
        self._nonce = nonce
        self._columns = served.artifact.spec.columns
        self._name = served.name
        self._version = served.version
        self._schema = served.events
        self._whole = served.artifact.spec.chunking == "whole"
        outputs = served.outputs.outputs
        one_axis = len(outputs) == 1 and len(outputs[0].shape) == 1
        plain = one_axis and outputs[0].per == "step" and not served.outputs.attention
        self._only = outputs[0].name if plain else None
        self._once = frozenset(output.name for output in outputs if output.per == "chunk")
        self._begin = dumps(Media.JSON, {"model": self._name, "version": self._version})[:-1]

    def chunk(
        self, body: bytes, media: Media, stream: str, precondition: Precondition | None
    ) -> Chunk:
        """The one chunk of a body.

        Raises:
            ChunksUnsupported, FinalUnsupported, MalformedBody, InvalidInput, ChunkTooLong: with
                the fact `stream`.
        """
        plain = self.plain_chunk(body, media, stream, precondition)
        if plain is not None:
            return plain
        try:
            self._check_takes_chunks()
            found = self.bodies.validate(self.bodies.types[media].chunk, media, body)
            steps = self._chunk_steps(found, "")
        except CarryError as error:
            raise _about(stream, error) from error
        return self._chunk(found, steps, stream, precondition, final=found.final)

    def plain_chunk(
        self,
        body: bytes,
        media: Media,
        stream: str,
        precondition: Precondition | None = None,
        more: Sequence[bytes] = (),
    ) -> Chunk | None:
        """The one chunk of a body that is plainly good; None where `chunk` has to say.

        Args:
            more: rows that follow those of the body, each part as `plain_rows` gives it.
        """
        if self._whole:
            return None
        plain = self._plain.chunk(media, body, more)
        return None if plain is None else self._chunk(*plain, stream, precondition)

    def plain_rows(self, part: bytes) -> bytes | None:
        """A list of rows in JSON as float32, if it is plainly good."""
        return self._plain.rows(part)

    def items(self, body: bytes, media: Media) -> list[Chunk | CarryError]:
        """The chunks of a request for many streams, or what is wrong with each.

        An item's error has the fact `stream` where the item names one.

        Raises:
            MalformedBody, InvalidInput: the body as a whole is not a request.
            ChunksUnsupported
        """
        self._check_takes_chunks()
        plain = self._plain.items(media, body)
        if plain is not None and all(item.if_match is None for item, _ in plain):
            return [self._chunk(item, steps, item.stream, None) for item, steps in plain]
        types = self.bodies.types[media]
        try:
            found: list[Any] = list(self.bodies.validate(types.many, media, body).chunks)
        except InvalidInput as error:
            found = self._item_values(body, media, error)
        if len(found) > self._limits.max_items:
            raise _too_many("chunks", self._limits.max_items, len(found))
        return [self._item(value, media, f"chunks[{at}]") for at, value in enumerate(found)]

    def _item_values(self, body: bytes, media: Media, error: InvalidInput) -> list[Any]:
        """The items as plain values, where it is not the body as a whole that is wrong."""
        values = loads(media, body)
        if not isinstance(values, dict) or not isinstance(values.get("chunks"), list):
            raise error
        if len(values) > 1:
            raise error
        items: list[Any] = values["chunks"]
        return items

    def _item(self, value: Any, media: Media, inside: str) -> Chunk | CarryError:
        stream: str | None = None
        try:
            name = value.stream if isinstance(value, ItemBody) else _name_in(value)
            if name is not None:
                stream = stream_name(name, f"{inside}.stream")
            if not isinstance(value, ItemBody):
                value = self.bodies.validate_part(
                    self.bodies.types[media].item, media, value, inside
                )
            precondition = None
            if value.if_match is not None:
                precondition = parse_if_match(value.if_match, f"{inside}.if_match", bare=True)
            steps = self._chunk_steps(value, inside)
            return self._chunk(value, steps, value.stream, precondition, final=value.final)
        except CarryError as error:
            return error if stream is None else _about(stream, error)

    def sequences(self, body: bytes, media: Media) -> list[Steps]:
        """The whole sequences of a predict request.

        Raises:
            MalformedBody, InvalidInput, ChunkTooLong
        """
        plain = self._plain.sequences(media, body)
        if plain is not None:
            return plain
        found = self.bodies.validate(self.bodies.types[media].predict, media, body).sequences
        if len(found) > self._limits.max_items:
            raise _too_many("sequences", self._limits.max_items, len(found))
        most = _Most(self._limits.max_predict_steps, "max_predict_steps")
        limit = self.served.chunk_limit
        longest = most if limit is None else min(most, _Most(limit, "max_chunk_steps"))
        steps = [
            self._steps(sequence, f"sequences[{at}]", longest) for at, sequence in enumerate(found)
        ]
        _counted(sum(sequence.length for sequence in steps), "sequences", most)
        return steps

    def forecast_request(self, body: bytes, media: Media, stream: str) -> ForecastRequest:
        """How a body asks a decoder to look ahead.

        Raises:
            ForecastUnsupported, MalformedBody, InvalidInput: with the fact `stream`.
        """
        try:
            self.served.require_decoder()
            kind = self.bodies.types[media].forecast
            if kind is None:
                raise TypeError("expected a body type of a model with a decoder")
            found = self.bodies.validate(kind, media, body)
            most = self._limits.max_forecast_samples
            if found.samples > most:
                raise InvalidInput(
                    f"samples: expected at most {most}, got {found.samples}",
                    at="samples",
                    expected=most,
                    got=found.samples,
                )
            return ForecastRequest(
                found.horizon, found.samples, found.seed, self._future(found), found.position
            )
        except CarryError as error:
            raise _about(stream, error) from error

    def _future(self, body: ForecastBody) -> EventColumns | None:
        schema = coming_schema(self.served)
        if body.future is None or schema is None:
            return None
        if len(body.future) != body.horizon:
            expected = f"{body.horizon} steps, as many as `horizon`"
            raise InvalidInput(
                f"future: expected {expected}, got {len(body.future)}",
                at="future",
                expected=body.horizon,
                got=len(body.future),
            )
        return columns_from_events(schema, body.future)

    def forecast(self, found: ForecastReply, request: ForecastRequest) -> dict[str, Any]:
        """The members of a forecast's reply."""
        decoder, mark, seen = self.served.require_decoder(), found.mark, found.forecast
        document: dict[str, Any] = {
            "model": self._name,
            "version": self._version,
            "stream": found.key.stream,
            "epoch": mark.epoch.hex(),
            "position": mark.position,
            "tag": mark.tag.hex(),
        }
        if found.times_ms is not None:
            document["times_ms"] = list(found.times_ms)
        document["levels"] = list(decoder.head.quantiles)
        targets: dict[str, Any] = {}
        for at, name in enumerate(decoder.targets):
            targets[name] = {
                "point": np.ascontiguousarray(seen.point[:, at]),
                "quantiles": np.ascontiguousarray(seen.quantiles[:, at]),
            }
            if request.samples:
                targets[name]["paths"] = np.ascontiguousarray(seen.paths[..., at])
        document["forecast"] = targets
        return document

    def _chunk(
        self,
        body: ChunkBody | PlainChunk | RowsBody,
        steps: Steps,
        stream: str,
        precondition: Precondition | None,
        *,
        final: bool = False,
    ) -> Chunk:
        nonce = self._nonce() if body.position is None else b""
        return Chunk(
            StreamKey(self._name, stream),
            steps,
            chunk_digest(self._schema, steps, nonce, final=final),
            body.position,
            None if body.epoch is None else bytes.fromhex(body.epoch),
            precondition,
            final,
        )

    def _check_takes_chunks(self) -> None:
        if self._whole:
            raise ChunksUnsupported(
                f"model {self._name!r} reads its sequences from both ends: expected whole ones, "
                "sent to its address /predict",
                expected="/predict",
            )

    def _chunk_steps(self, body: ChunkBody, inside: str) -> Steps:
        """The steps of a chunk; a final one may have none."""
        if body.final and self.served.blocks is None:
            at = f"{inside}.final" if inside else "final"
            raise FinalUnsupported(
                f"{at}: expected none, since model {self._name!r} has no `blocks` and answers "
                "every event at once",
                at=at,
                expected="no `final`",
            )
        return self._steps(body, inside, self._most_chunk, least=0 if body.final else 1)

    def _steps(self, body: StepsBody, inside: str, most: _Most, least: int = 1) -> Steps:
        lead = f"{inside}." if inside else ""
        if (body.events is None) == (body.inputs is None):
            raise self._not_one(inside or "body", "both" if body.events is not None else "none")
        schema = self.served.events
        if body.events is not None and schema is not None:
            count = _counted(len(body.events), f"{lead}events", most, least)
            columns = columns_from_events(schema, body.events)
            return Steps(Feed.EVENTS, count, columns=columns)
        at = f"{lead}inputs"
        rows = (
            self._rows_of_bytes(body.inputs, at)
            if isinstance(body.inputs, bytes)
            else self._rows_of_lists(body.inputs, at, most)
        )
        _counted(len(rows), at, most, least)
        try:
            check_rows(self._columns, rows)
        except DataError as error:
            raise self._invalid_rows(at, error, body.inputs) from error
        return Steps(Feed.INPUTS, len(rows), rows=rows)

    def _rows_of_lists(self, given: list[list[float]], at: str, most: _Most) -> FloatRows:
        _counted(len(given), at, most, least=0)
        wide = len(self._columns)
        for index, row in enumerate(given):
            if len(row) != wide:
                raise self._wrong_width(f"{at}[{index}]", str(len(row)))
        with np.errstate(over="ignore"):
            return np.array(given, np.float64).astype(np.float32).reshape(-1, wide)

    def _rows_of_bytes(self, given: bytes, at: str) -> FloatRows:
        wide = 4 * len(self._columns)
        if len(given) % wide:
            raise self._wrong_width(at, f"{len(given)} bytes, which {wide} does not divide")
        return np.frombuffer(given, "<f4").astype(np.float32, copy=False).reshape(-1, wide // 4)

    def _invalid_rows(
        self, at: str, error: DataError, given: bytes | list[list[float]]
    ) -> InvalidInput:
        """The refusal of one value of a row, as `inputs[3][0]`, with the name of its column."""
        if error.index is None or error.field is None:
            return invalid_data(at, error)
        column = [column.name for column in self._columns].index(error.field)
        place = f"{at}[{error.index}][{column}]"
        # As it was sent: after the cast, what overflowed is infinite.
        got = error.got if isinstance(given, bytes) else shown(given[error.index][column])
        return InvalidInput(
            f"{place} ({error.field}): expected {error.expected}, got {got}",
            at=place,
            column=error.field,
            expected=error.expected,
            got=got,
        )

    def _wrong_width(self, at: str, got: str) -> InvalidInput:
        names = [column.name for column in self._columns]
        more = ", ..." if len(names) > NAMED_COLUMNS else ""
        listed = ", ".join(names[:NAMED_COLUMNS]) + more
        expected = f"rows of {len(names)} values ({listed})"
        return InvalidInput(
            f"{at}: expected {expected}, got {got}", at=at, expected=expected, got=got
        )

    def _not_one(self, at: str, got: str) -> InvalidInput:
        feeds = "`inputs`" if self.served.events is None else "exactly one of `events` and `inputs`"
        return InvalidInput(f"{at}: expected {feeds}, got {got}", at=at, expected=feeds, got=got)

    def reply(self, reply: Reply, options: ReplyOptions) -> dict[str, Any]:
        """The members of a chunk's reply."""
        mark = reply.mark
        document: dict[str, Any] = {
            "model": self._name,
            "version": self._version,
            "stream": reply.key.stream,
            "epoch": mark.epoch.hex(),
            "position": mark.position,
            "tag": mark.tag.hex(),
            "outputs": self.outputs(reply.outputs, options),
            "replayed": reply.replayed,
        }
        if reply.created:
            document["created"] = True
        if reply.output_position is not None:
            document["output_position"] = reply.output_position
        if options.return_state:
            document["state"] = self.state(reply.state)
        if options.return_attention:
            document["attention"] = self.attention(reply.outputs)
        return document

    def reply_bytes(self, reply: Reply, media: Media) -> bytes:
        """The bytes of `reply`, of every step and without the state."""
        if media is not Media.JSON or self._only is None or reply.output_position is not None:
            return dumps(media, self.reply(reply, _EVERY_STEP))
        epoch, tag, position = reply.mark
        # A stream's name needs no escapes.
        return b'%b,"stream":"%b","epoch":"%b","position":%d,"tag":"%b","outputs":%b,%b' % (
            self._begin,
            reply.key.stream.encode(),
            epoch.hex().encode(),
            position,
            tag.hex().encode(),
            dumps(media, {self._only: np.ascontiguousarray(reply.outputs)}),
            _ENDS[reply.replayed, reply.created],
        )

    def prediction(self, prediction: Prediction, options: ReplyOptions) -> dict[str, Any]:
        """The members of one sequence's prediction."""
        document: dict[str, Any] = {"outputs": self.outputs(prediction.outputs, options)}
        if options.return_state:
            document["state"] = self.state(prediction.state)
        if options.return_attention:
            document["attention"] = self.attention(prediction.outputs)
        return document

    def outputs(self, rows: FloatRows, options: ReplyOptions) -> dict[str, Any]:
        """Named outputs [T, ...] of packed rows [T, O], or [...] of the last step alone (None
        where there is no step); [...] of an output that holds once for the whole chunk."""
        if not len(rows) and not options.return_sequences:
            # in blocks a chunk may bring no output, and so no last one
            return dict.fromkeys(self.served.outputs.slices)
        shown_rows = rows if options.return_sequences else rows[-1]
        if self._only is not None:
            # the packed rows are its values as they are
            return {self._only: np.ascontiguousarray(shown_rows)}
        named = self.served.outputs.by_name(shown_rows)
        if self._once and options.return_sequences:
            named = {n: values[-1] if n in self._once else values for n, values in named.items()}
        return _writable(named)

    def attention(self, rows: FloatRows) -> dict[str, Any]:
        """By layer that attends over the chunk, the weight of each step [T]."""
        return _writable(self.served.outputs.attention_by_name(rows))

    def check_options(self, options: ReplyOptions) -> None:
        """Refuse what the model cannot return.

        Raises:
            InvalidInput
        """
        if options.return_attention and not self.served.outputs.attention:
            expected = "a model with attention over the chunk"
            raise InvalidInput(
                f"?return_attention: expected {expected}, model {self._name!r} has none",
                at="?return_attention",
                expected=expected,
                got="true",
            )

    def state(self, state: State) -> dict[str, Any]:
        """A state by name."""
        return _writable(self.served.state.by_name(state))


def _writable(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    # The writers take arrays in C order and scalars, but no array without axes.
    return {
        name: np.ascontiguousarray(array) if array.ndim else array[()]
        for name, array in arrays.items()
    }


def _counted(count: int, at: str, most: _Most, least: int = 1) -> int:
    if count < least:
        expected = "at least one step"
        raise InvalidInput(f"{at}: expected {expected}, got none", at=at, expected=expected, got=0)
    if count > most.steps:
        raise ChunkTooLong(
            f"{at}: expected at most {most.steps} steps ({most.name}), got {count}",
            at=at,
            expected=most.steps,
            got=count,
        )
    return count


def _too_many(at: str, most: int, got: int) -> InvalidInput:
    return InvalidInput(
        f"{at}: expected at most {most} items, got {got}", at=at, expected=most, got=got
    )


def _name_in(value: Any) -> str | None:
    name = value.get("stream") if isinstance(value, dict) else None
    return name if isinstance(name, str) else None


def _about(stream: str, error: CarryError) -> CarryError:
    error.facts = {**error.facts, "stream": stream}
    return error
