"""What a generator sends and what it expects back: bodies made beforehand, positions kept.

A `Traffic` hands out requests for streams that have none in flight, in turn, each at the
stream's next position, and checks every reply: its status by the caller, its position here.
The replies of a few streams are kept, so that their outputs can be checked after the run.
Refuses to go on after a wrong reply: a figure from wrong answers is worth nothing.
"""

from __future__ import annotations

import random
import re
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

SAMPLED_CHUNKS = 24
"""Chunks of a sampled stream whose replies are kept; the oracle that checks them is slow."""

Media = Literal["json", "msgpack"]
Ticket = tuple[tuple[int, int], ...]
"""The streams of a request, each with the position that its reply must give."""


class WrongReplyError(Exception):
    """A reply that is not the one expected; the message shows its beginning."""


@dataclass(frozen=True)
class TrafficSpec:
    """Everything a generator needs to know; travels to its process.

    Attributes:
        path: where requests go; `%b` stands for the stream's name in a request for one stream.
        media: how bodies are written.
        member: `inputs` or `events` of a chunk, the one of `sequences` to predict (JSON only), or
            the `horizon` of a forecast.
        values: the member's value in each body, already written.
        steps: the events in each of them; of a forecast those that it looks ahead.
        prefix: begins every stream's name.
        streams: how many there are.
        position: of every stream at the start.
        items: chunks per request; 0 for the route of one stream.
        moves: whether a request advances its stream; a forecast does not.
        positions: whether replies give the position (the floors' and predictions do not).
        sampled: streams whose first replies are kept.
        seed: of the order of the streams.
    """

    path: bytes
    media: Media
    member: Literal["inputs", "events", "sequences", "horizon"]
    values: tuple[bytes, ...]
    steps: tuple[int, ...]
    prefix: str
    streams: int
    position: int = 0
    items: int = 0
    moves: bool = True
    positions: bool = True
    sampled: int = 0
    seed: int = 1

    def name(self, stream: int) -> bytes:
        """The stream's name."""
        return b"%b-%07d" % (self.prefix.encode(), stream)

    def body(self, stream: int, chunk: int) -> int:
        """Which body a stream's n-th chunk has."""
        return (stream + chunk) % len(self.values)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The reply to one chunk of a sampled stream."""

    stream: int
    chunk: int
    reply: bytes


@dataclass
class Traffic:
    """The streams of one spec, in one generator."""

    spec: TrafficSpec
    sampled: list[Sampled] = field(default_factory=list)

    def __post_init__(self) -> None:
        order = list(range(self.spec.sampled, self.spec.streams))
        random.Random(self.spec.seed).shuffle(order)
        # Sampled streams come first, so that a slow server reaches them too.
        self._free = deque([*range(self.spec.sampled), *order])
        self._position = [self.spec.position] * self.spec.streams
        self._chunks = [0] * self.spec.streams
        self._write = _writer(self.spec)
        self._per_request = max(1, self.spec.items)
        self.events = 0

    @property
    def ready(self) -> bool:
        """Whether enough streams are without a request in flight."""
        return len(self._free) >= self._per_request

    def lacks(self, least: int) -> bool:
        """Whether a sampled stream had fewer chunks than `least`."""
        return any(count < least for count in self._chunks[: self.spec.sampled])

    def request(self) -> tuple[bytes, Ticket]:
        """The next request, whole, and what `accept` needs to check its reply."""
        spec, free, positions = self.spec, self._free, self._position
        values, steps = spec.values, spec.steps
        parts = []
        ticket = []
        for _ in range(self._per_request):
            stream = free.popleft()
            position = positions[stream]
            body = (stream + self._chunks[stream]) % len(values)
            parts.append((spec.name(stream), position, values[body]))
            ticket.append((stream, position + steps[body] if spec.moves else position))
        return self._write(parts), tuple(ticket)

    def accept(self, ticket: Ticket, reply: bytes, body_at: int) -> None:
        """Check a reply, and let its streams continue.

        Raises:
            WrongReplyError: a position is another than expected, or an item failed.
        """
        spec = self.spec
        if spec.positions:
            if spec.items:
                self._check_items(ticket, reply)
            elif position_in(reply, body_at, spec.media) != ticket[0][1]:
                raise WrongReplyError(
                    f"expected position {ticket[0][1]}, got {reply[body_at : body_at + 300]!r}"
                )
        for stream, after in ticket:
            chunk = self._chunks[stream]
            if stream < spec.sampled and chunk < SAMPLED_CHUNKS and not spec.items:
                self.sampled.append(Sampled(stream, chunk, reply[body_at:]))
            self.events += spec.steps[spec.body(stream, chunk)]
            self._position[stream] = after
            self._chunks[stream] = chunk + 1
            self._free.append(stream)

    def _check_items(self, ticket: Ticket, reply: bytes) -> None:
        expected = [after for _, after in ticket]
        positions = (
            [int(digits) for digits in _JSON_POSITIONS.findall(reply)]
            if self.spec.media == "json"
            else [_packed_int(reply, match.end()) for match in _PACKED_POSITIONS.finditer(reply)]
        )
        if positions != expected:
            raise WrongReplyError(
                f"expected positions {expected}, got {positions}: {reply[:300]!r}"
            )


def _writer(spec: TrafficSpec) -> Callable[[list[tuple[bytes, int, bytes]]], bytes]:
    """How requests of this spec are written, from names, positions and values."""
    head = b"POST " + spec.path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/"
    head += spec.media.encode() + b"\r\nContent-Length: %d\r\n\r\n"
    member = spec.member.encode()
    is_json = spec.media == "json"
    fields = _json_fields if is_json else _packed_fields

    def write_many(parts: list[tuple[bytes, int, bytes]]) -> bytes:
        items = [fields(name, position, member, value) for name, position, value in parts]
        if is_json:
            body = b'{"chunks":[' + b",".join(items) + b"]}"
        else:
            body = b"\x81\xa6chunks\xdc" + struct.pack(">H", len(items)) + b"".join(items)
        return head % len(body) + body

    def write_sequence(parts: list[tuple[bytes, int, bytes]]) -> bytes:
        body = b'{"sequences":[%b]}' % parts[0][2]
        return head % len(body) + body

    def write_one(parts: list[tuple[bytes, int, bytes]]) -> bytes:
        name, position, value = parts[0]
        body = fields(None, position, member, value)
        return head % (name, len(body)) + body

    if spec.items:
        return write_many
    return write_sequence if spec.member == "sequences" else write_one


def _json_fields(name: bytes | None, position: int, member: bytes, value: bytes) -> bytes:
    if name is None:
        return b'{"position":%d,"%b":%b}' % (position, member, value)
    return b'{"stream":"%b","position":%d,"%b":%b}' % (name, position, member, value)


def _packed_fields(name: bytes | None, position: int, member: bytes, value: bytes) -> bytes:
    stream = b"\x82" if name is None else b"\x83\xa6stream" + _packed_text(name)
    packed = struct.pack(">Q", position)
    return b"%b\xa8position\xcf%b%b%b" % (stream, packed, _packed_text(member), value)


def _packed_text(text: bytes) -> bytes:
    return bytes([0xA0 | len(text)]) + text if len(text) < 32 else bytes([0xD9, len(text)]) + text


def packed_binary(value: bytes) -> bytes:
    """MessagePack's binary string."""
    return b"\xc6" + struct.pack(">I", len(value)) + value


_JSON_POSITIONS = re.compile(rb'"position":(\d+)')
_PACKED_POSITIONS = re.compile(rb"\xa8position")


def position_in(reply: bytes, body_at: int, media: Media) -> int | None:
    """The position that a reply for one stream gives, or None where it gives none."""
    if media == "json":
        match = _JSON_POSITIONS.search(reply, body_at)
        return None if match is None else int(match[1])
    at = reply.find(b"\xa8position", body_at)
    return None if at < 0 else _packed_int(reply, at + 9)


_PACKED_SIZES = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}


def _packed_int(reply: bytes, at: int) -> int:
    """The unsigned integer of MessagePack at an offset; -1 for anything else."""
    first = reply[at]
    if first < 0x80:
        return first
    size = _PACKED_SIZES.get(first)
    return -1 if size is None else int.from_bytes(reply[at + 1 : at + 1 + size], "big")
