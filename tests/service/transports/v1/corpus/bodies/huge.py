"""Bodies of nearly 2 MiB that are cheap to send and expensive to parse.

Each is made when it is asked for. They are for the model `flights` (25 columns, 14 event fields)
under the default limits. The first five are an attack's; the others are of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

JSON, MSGPACK = "application/json", "application/msgpack"
MAX_BYTES = 2 * 2**20

CHUNK = "/v1/models/flights/streams/huge/chunks"
CHUNKS = "/v1/models/flights/chunks"
PREDICT = "/v1/models/flights/predict"
FORK = "/v1/models/flights/streams/huge/fork"
STATE = "/v1/models/flights/streams/huge/state"
INFER = "/v2/models/flights/infer"

ROW = b"[" + b",".join([b"0"] * 25) + b"]"
SHORT_ROW = b"[" + b",".join([b"0"] * 24) + b"]"


class HugeBody(NamedTuple):
    """A request and the answer that it should get.

    Attributes:
        code: of the problem document; for a request for many streams of every item.
    """

    name: str
    path: str
    media: str
    make: Callable[[], bytes]
    status: int
    code: str
    method: str = "POST"


def _filled(lead: bytes, part: bytes, tail: bytes = b"", between: bytes = b",") -> bytes:
    """As many equal parts as fit."""
    count = (MAX_BYTES - len(lead) - len(tail)) // (len(part) + len(between))
    return lead + between.join([part] * count) + tail


def _packed(lead: bytes, element: bytes) -> bytes:
    """An array of as many equal elements as fit, behind `lead`, in MessagePack."""
    count = (MAX_BYTES - len(lead) - 5) // len(element)
    return lead + b"\xdd" + count.to_bytes(4, "big") + element * count


def _unknown_members() -> bytes:
    return b"{%b}" % b",".join([b'"m%07d":0' % at for at in range(MAX_BYTES // 13)])


def _one_name(lead: bytes = b"", part: bytes = b"a", tail: bytes = b"") -> bytes:
    name = _filled(lead, part, tail + b" " * 16, b"").rstrip()
    return b"\x81\xdb" + len(name).to_bytes(4, "big") + name + b"\xc0"


PLACES = {
    "a name like a deep place": (b"x - at `$", b".a"),
    "a name like a place at a long index": (b"x - at `$[", b"1", b"]"),
    "a name like a place in a name": (b"x` - at `$.events", b"[0]"),
}
"""Names of members that end as the places in msgspec's errors do."""


def _tensor(shape: bytes, part: bytes) -> Callable[[], bytes]:
    lead = b'{"inputs":[{"name":"inputs","datatype":"FP32","shape":%b,"data":[' % shape
    return lambda: _filled(lead, part, b"]}]}")


STATE_LEAD = b'{"fingerprint":"%b","feed":"inputs","position":0,"state":{' % (b"0" * 32)


def _state(value: bytes) -> bytes:
    return _filled(STATE_LEAD + b'"lstm_1.hidden":[', value, b"]}}")


def _members(lead: bytes, value: bytes, tail: bytes) -> Callable[[], bytes]:
    """An object of as many members as fit, each with a name of its own and this value."""
    count = (MAX_BYTES - len(lead) - len(tail)) // (len(value) + 11)
    return lambda: lead + b",".join([b'"m%06d":%b' % (at, value) for at in range(count)]) + tail


def _items(part: bytes) -> bytes:
    """A thousand items, each with a list of as many parts as fit."""
    inputs = b",".join([part] * (2_000 // (len(part) + 1)))
    item = b'{"stream":"a%04d","inputs":[%b]}'
    return b'{"chunks":[%b]}' % b",".join([item % (at, inputs) for at in range(1000)])


def _messagepack() -> Iterator[HugeBody]:
    def body(
        name: str, path: str, lead: bytes, element: bytes, code: str = "invalid_input"
    ) -> HugeBody:
        status = 413 if code == "chunk_too_long" else 422
        return HugeBody(name, path, MSGPACK, lambda: _packed(lead, element), status, code)

    inputs, events = b"\x81\xa6inputs", b"\x81\xa6events"
    yield body("unknown member of empty maps", CHUNK, b"\x81\xa1x", b"\x80")
    yield body("inputs of empty arrays", CHUNK, inputs, b"\x90")
    yield body("events of empty maps", CHUNK, events, b"\x80", "chunk_too_long")
    yield body("position of nils", CHUNK, b"\x82\xa6inputs\xc4\x00\xa8position", b"\xc0")
    yield body("chunks of empty maps", CHUNKS, b"\x81\xa6chunks", b"\x80")
    yield body("chunks of nils", CHUNKS, b"\x81\xa6chunks", b"\xc0")
    yield body("sequences of empty maps", PREDICT, b"\x81\xa9sequences", b"\x80")
    one_item = b"\x81\xa6chunks\x91\x82\xa6stream\xa1a\xa6inputs"
    yield HugeBody(
        "an item of empty arrays", CHUNKS, MSGPACK, lambda: _packed(one_item, b"\x90"), 200,
        "invalid_input",
    )  # fmt: skip
    member = b"\xa4\x6c\x6f\x61\x64\xc0"
    pairs = MAX_BYTES // len(member) - 10
    yield HugeBody(
        "an event of one member again and again", CHUNK, MSGPACK,
        lambda: events + b"\x91\xdf" + pairs.to_bytes(4, "big") + member * pairs,
        422, "invalid_input",
    )  # fmt: skip
    yield HugeBody("one name", CHUNK, MSGPACK, _one_name, 422, "invalid_input")
    for title, parts in PLACES.items():
        yield HugeBody(
            title, CHUNK, MSGPACK, lambda name=parts: _one_name(*name), 422, "invalid_input"
        )
    unknown = b"".join([b"\xa3%03d\xc0" % at for at in range(400)])
    lead, item = b"\x81\xa6chunks\xdc\x03\xe8", b"\xde\x01\x91\xa6stream\xa1a" + unknown
    yield HugeBody(
        "a thousand items of unknown members", CHUNKS, MSGPACK,
        lambda: lead + item * 1000, 200, "invalid_input",
    )  # fmt: skip
    yield body("fork of nils", FORK, b"\x81\xa2to", b"\xc0")


def _json() -> Iterator[HugeBody]:
    def body(
        name: str, make: Callable[[], bytes], status: int = 422, code: str = "invalid_input",
        path: str = CHUNK, method: str = "POST",
    ) -> HugeBody:  # fmt: skip
        return HugeBody(name, path, JSON, make, status, code, method)

    inputs = b'{"inputs":['
    item = b'{"stream":"a","inputs":[%b]}' % SHORT_ROW
    yield body("unknown members", _unknown_members)
    yield body("items one column short", lambda: _filled(b'{"chunks":[', item, b"]}"), path=CHUNKS)
    yield body("valid rows", lambda: _filled(inputs, ROW, b"]}"), 413, "chunk_too_long")
    yield body("empty rows", lambda: _filled(inputs, b"[]", b"]}"), 413, "chunk_too_long")
    yield body("rows of empty lists", lambda: _filled(inputs + b"[", b"[]", b"]]}"))
    yield body("one row", lambda: _filled(inputs + b"[", b"0", b"]]}"))
    yield body("one member again and again", lambda: _filled(b"{", b'"position":0', b"}"))
    yield body("events", lambda: _filled(b'{"events":[', b"{}", b"]}"), 413, "chunk_too_long")
    yield body(
        "an event of one member again and again",
        lambda: _filled(b'{"events":[{', b'"distance":0', b"}]}"),
    )
    yield body("an event of lists", lambda: _filled(b'{"events":[{"distance":[', b"[]", b"]}]}"))
    yield body("open lists", lambda: _filled(inputs, b"[", between=b""), 400, "malformed_body")
    yield body(
        "open objects", lambda: _filled(b"", b'{"inputs":', between=b""), 400, "malformed_body"
    )
    yield body(
        "one string", lambda: b'{"epoch":"%b","inputs":[%b]}' % (b"a" * (MAX_BYTES - 1000), ROW)
    )
    yield body("escapes", lambda: _filled(b'{"epoch":"', b"\\\\", b'"}', between=b""))
    yield body("strings for rows", lambda: _filled(inputs, b'"]"', b"]}"), 413, "chunk_too_long")
    yield body("numbers for items", lambda: _filled(b'{"chunks":[', b"0", b"]}"), path=CHUNKS)
    yield body("numbers for sequences", lambda: _filled(b'{"sequences":[', b"0", b"]}"),
               path=PREDICT)  # fmt: skip
    yield body("a thousand items of empty lists", lambda: _items(b"[]"), 200, path=CHUNKS)
    yield body("a thousand items of short rows", lambda: _items(SHORT_ROW), 200, path=CHUNKS)
    yield body(
        "an item of empty lists",
        lambda: _filled(b'{"chunks":[{"stream":"a","inputs":[', b"[]", b"]}]}"),
        200, "chunk_too_long", CHUNKS,
    )  # fmt: skip
    yield body(
        "a sequence of short rows",
        lambda: _filled(b'{"sequences":[{"inputs":[', SHORT_ROW, b"]}]}"),
        path=PREDICT,
    )  # fmt: skip
    yield body("lists in lists", lambda: _filled(b'{"odd":[', b"[" * 1000 + b"]" * 1000, b"]}"))
    for title, (begin, part, *end) in PLACES.items():
        name = b'{"' + begin, part, b"".join(end) + b'":1}'
        yield body(title, lambda name=name: _filled(*name, between=b""))
    yield body("a tensor of deep lists", _tensor(b"[1,25]", b"[[[[[[[0]]]]]]]"), path=INFER)
    yield body("a tensor of short lists", _tensor(b"[1000,58,25]", b"[0]"), path=INFER)
    yield body("a tensor of short lists in one", _tensor(b"[1000,58,25]", b"[[0],[0]]"), path=INFER)
    parameters = b'{"inputs":[],"parameters":{'
    for value in (b"[]", b"{}", b"0"):
        title = f"parameters that are each {value.decode()}"
        yield body(title, _members(parameters, value, b"}}"), path=INFER)
    parameters = b'{"inputs":[{"name":"inputs","datatype":"FP32","shape":[],"parameters":{'
    yield body("parameters of a tensor", _members(parameters, b"[]", b"}}]}"), path=INFER)
    yield body("parts of a state", _members(b'{"state":{', b"{}", b"}}"), path=STATE, method="PUT")
    yield body("a state of many parts", _members(STATE_LEAD, b"0", b"}}"), path=STATE, method="PUT")
    yield body("a state of lists", lambda: _state(b"[]"), 409, "state_incompatible", STATE, "PUT")
    yield body("a state of numbers", lambda: _state(b"0"), 409, "state_incompatible", STATE, "PUT")


HUGE = [*_json(), *_messagepack()]
ATTACK = [
    body
    for body in HUGE
    if (body.media, body.name)
    in {
        (MSGPACK, "unknown member of empty maps"),
        (MSGPACK, "inputs of empty arrays"),
        (JSON, "unknown members"),
        (JSON, "items one column short"),
        (JSON, "valid rows"),
    }
]
