"""The parameters of a V2 inference request: Triton's sequence extension, and Carry's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from models.spec.detection import MAX_ALARM_RATE
from service.codec.decoding import invalid
from service.codec.field_rules import EPOCH, MAX_POSITION, stream_name
from service.transports.v2.values import Parameter

MAX_SEQUENCE_ID: Final = 2**64 - 1
IGNORED: Final = ("priority",)
IGNORED_PREFIX: Final = "triton_"
"""Parameters of Triton's clients that mean nothing here."""

KNOWN: Final = (
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "position",
    "epoch",
    "dry_run",
    "false_alarms_per_day",
    "timeout",
    *IGNORED,
)

_is_epoch = re.compile(EPOCH).fullmatch


class InferParameters(NamedTuple):
    """The parameters of one request.

    Attributes:
        stream: name of the stream; None for a stateless prediction.
        starts_over: whether the stream starts over with this request.
        ends: whether no request of this sequence follows.
        position: index of the first event in the stream; None to append.
        epoch: expected epoch of the stream, 16 hex digits; of one that starts over, the epoch that
            ends.
        timeout_s: how long the client waits, in seconds; None if it does not say.
        dry_run: whether the chunk is only computed.
        false_alarms_per_day: the rate that the alarms of these events follow; None for the model's.
    """

    stream: str | None = None
    starts_over: bool = False
    ends: bool = False
    position: int | None = None
    epoch: str | None = None
    timeout_s: float | None = None
    dry_run: bool = False
    false_alarms_per_day: float | None = None


NO_PARAMETERS: Final = InferParameters()


def parse_parameters(parameters: Mapping[str, Parameter]) -> InferParameters:
    """The parameters of a request, each checked.

    An unknown one is rejected, so that a misspelt `position` is noticed.

    Raises:
        InvalidInput, InvalidName
    """
    if not parameters:
        return NO_PARAMETERS
    for name in parameters:
        if name not in KNOWN and not name.startswith(IGNORED_PREFIX):
            expected = f"one of {', '.join(KNOWN)}"
            raise invalid("parameters", expected, repr(name[:100]))
    stream = parse_sequence_id(parameters.get("sequence_id", 0))
    starts_over = _flag(parameters, "sequence_start")
    ends = _flag(parameters, "sequence_end")
    position = _position(parameters)
    epoch = parameters.get("epoch")
    if epoch is not None and not (isinstance(epoch, str) and _is_epoch(epoch)):
        raise invalid("parameters.epoch", "16 hex digits", _shown(epoch))
    dry_run = _flag(parameters, "dry_run")
    if stream is None:
        for name in ("sequence_start", "sequence_end", "position", "epoch", "dry_run"):
            value = parameters.get(name)
            if value is not None and value is not False:
                raise invalid("parameters.sequence_id", f"one, since {name} is set", "none")
    if starts_over and position not in (None, 0):
        raise invalid("parameters.position", "0, since the sequence starts", position)
    timeout_s = _timeout_s(parameters)
    return InferParameters(
        stream, starts_over, ends, position, epoch, timeout_s, dry_run, _alarm_rate(parameters)
    )


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
        raise invalid(at, f"a whole number up to {MAX_SEQUENCE_ID}, or a string", _shown(value))
    return str(value) if value else None


def _flag(parameters: Mapping[str, Parameter], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise invalid(f"parameters.{name}", "true or false", _shown(value))
    return value


def _position(parameters: Mapping[str, Parameter]) -> int | None:
    value = parameters.get("position")
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= MAX_POSITION:
        expected = f"a whole number from 0 to {MAX_POSITION}"
        raise invalid("parameters.position", expected, _shown(value))
    return value


def _alarm_rate(parameters: Mapping[str, Parameter]) -> float | None:
    value = parameters.get("false_alarms_per_day")
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < float(value) <= MAX_ALARM_RATE:
        expected = f"a number above 0, at most {MAX_ALARM_RATE:g}"
        raise invalid("parameters.false_alarms_per_day", expected, _shown(value))
    return float(value)


def _timeout_s(parameters: Mapping[str, Parameter]) -> float | None:
    value = parameters.get("timeout", 0)
    if type(value) is not int or not 0 <= value <= MAX_POSITION:
        raise invalid("parameters.timeout", "a whole number of microseconds", _shown(value))
    return value / 1e6 if value else None


def _shown(value: object) -> str:
    return repr(value)[:300]
