"""Parameters of V2's requests: Triton's sequence extension, and Carry's own. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from models.events.reader import EXPECTED
from models.spec.detection import MAX_ALARM_RATE
from models.spec.stream_name import is_stream_name
from service.codec.body_types import NonNegativeInt
from service.codec.decoding import decode_element, invalid
from service.codec.field_rules import EPOCH, stream_name
from service.codec.media import Media

Parameter = bool | int | float | str
"""The value of a request's or a reply's parameter."""

MAX_SEQUENCE_ID: Final = 2**64 - 1
_Epoch = Annotated[str, Meta(pattern=rf"^{EPOCH}\Z", extra={EXPECTED: "16 hex digits"})]
_AlarmRate = Annotated[float, Meta(gt=0, le=MAX_ALARM_RATE)]


class InferParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """The parameters of one request: Triton's sequence extension, and Carry's own.

    Attributes:
        sequence_id: number or name of the stream; 0, an empty string or None for no stream.
        starts_over: whether the stream starts over with this request.
        ends: whether no request of this sequence follows.
        position: index of the first event in the stream; None to append.
        epoch: expected epoch of the stream, 16 hex digits; of one that starts over, the epoch that
            ends.
        dry_run: whether the chunk is only computed.
        false_alarms_per_day: the rate that the alarms of these events follow; None for the model's.
        timeout_us: how long the client waits, in microseconds; 0 if it does not say.
        binary_by_default: over HTTP, whether outputs that do not say it are returned in the binary
            format.
    """

    sequence_id: int | str | None = None
    starts_over: bool = msgspec.field(default=False, name="sequence_start")
    ends: bool = msgspec.field(default=False, name="sequence_end")
    position: NonNegativeInt | None = None
    epoch: _Epoch | None = None
    dry_run: bool = False
    false_alarms_per_day: _AlarmRate | None = None
    timeout_us: NonNegativeInt = msgspec.field(default=0, name="timeout")
    binary_by_default: bool = msgspec.field(default=False, name="binary_data_output")

    @property
    def stream(self) -> str | None:
        """Name of the stream; None for a stateless prediction."""
        return str(self.sequence_id) if self.sequence_id else None


_DECODER: Final = msgspec.json.Decoder(InferParameters)
NO_PARAMETERS: Final = InferParameters()


def parse_parameters(parameters: Mapping[str, Parameter]) -> InferParameters:
    """The parameters of a request, each checked.

    An unknown one is rejected, so that a misspelt `position` is noticed; those of Triton's clients
    that mean nothing here are ignored.

    Raises:
        InvalidInput, InvalidName
    """
    if not parameters:
        return NO_PARAMETERS
    known: dict[str, Any] = {
        name: value
        for name, value in parameters.items()
        if name != "priority" and not name.startswith("triton_")
    }
    if "sequence_id" in known:
        known["sequence_id"] = parse_sequence_id(known["sequence_id"])
    parsed = decode_element(Media.JSON, known, InferParameters, "parameters")
    if parsed.stream is None:
        for name in ("sequence_start", "sequence_end", "position", "epoch", "dry_run"):
            if known.get(name, False) is not False:
                raise invalid("parameters.sequence_id", f"one, since {name} is set", "none")
    if parsed.starts_over and parsed.position:
        raise invalid("parameters.position", "0, since the sequence starts", parsed.position)
    return parsed


def decode_parameters(text: bytes) -> InferParameters | None:
    """The parameters of a request of a sequence, in JSON; None if they are unusual or invalid, and
    `parse_parameters` reads them or makes the error."""
    if b"null" in text:
        return None  # no parameter is null, but None is the default of some
    try:
        parsed = _DECODER.decode(text)
    except (msgspec.MsgspecError, ValueError):
        return None
    name = parsed.sequence_id
    is_valid = 0 < name <= MAX_SEQUENCE_ID if isinstance(name, int) else is_stream_name(name or "")
    return parsed if is_valid and not (parsed.starts_over and parsed.position) else None


def parse_sequence_id(value: Parameter) -> str | None:
    """The stream of a sequence id: a number in decimal digits, or the string itself.

    None for 0 and the empty string, which mean no sequence.

    Raises:
        InvalidInput, InvalidName
    """
    at = "parameters.sequence_id"
    if isinstance(value, str):
        return stream_name(value, at) if value else None
    if type(value) is not int or not 0 <= value <= MAX_SEQUENCE_ID:
        expected = f"a whole number up to {MAX_SEQUENCE_ID}, or a string"
        raise invalid(at, expected, repr(value)[:300])
    return str(value) if value else None
