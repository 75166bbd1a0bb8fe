"""Codec of states and replies: round trips, the documented layout, and rejected bytes."""

from __future__ import annotations

import math
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.spec.state import State
from service.core.values import (
    Feed,
    LastChunk,
    SourceMark,
    StoredReply,
    StreamHead,
    StreamState,
    Tombstone,
)
from service.store.codec import (
    COMPARED,
    TOMBSTONE_PREFIX,
    EncodedStream,
    decode_reply,
    decode_state,
    decode_states,
    encode_state,
    encode_tombstone,
    has_source_mark,
    pack_head,
    read_packed_head,
    read_streams,
    unpack_head,
)
from service.store.layout import HEADER_BYTES, CodecError, StateHeader
from service.store.source_mark import format_offset, parse_offset, source_name
from tests.support.streams import Streams, cached, encode_reply, same_reply, same_stream

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
MARKS = st.builds(
    StreamHead,
    st.binary(min_size=8, max_size=8),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**64 - 1),
)
STATES = st.builds(
    StreamState,
    head=MARKS,
    feed=st.sampled_from(Feed),
    fingerprint=st.binary(min_size=16, max_size=16),
    last=st.none()
    | st.builds(LastChunk, st.integers(0, 2**64 - 1), st.binary(min_size=16, max_size=16)),
    updated_ms=st.integers(-(2**63), 2**63 - 1),
    state=st.builds(
        State,
        hnp.arrays(np.float32, st.integers(0, 40), elements=FINITE),
        hnp.arrays(np.int64, st.integers(0, 5), elements=st.integers(-(2**63), 2**63 - 1)),
    ),
    since=st.none() | st.integers(0, 2**64 - 1),
    source=st.none()
    | st.builds(
        SourceMark, st.text(max_size=9), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)
    ),
)
REPLIES = st.builds(
    StoredReply,
    MARKS,
    hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=FINITE),
)


def resealed(value: bytes, at: int, crc_at: int, patch: bytes) -> bytes:
    """The bytes with a patch and a checksum that fits again."""
    patched = value[:at] + patch + value[at + len(patch) :]
    crc = zlib.crc32(patched[:crc_at] + patched[crc_at + 4 :])
    return patched[:crc_at] + struct.pack("<I", crc) + patched[crc_at + 4 :]


def head_of(stream: StreamState, value: bytes) -> EncodedStream:
    """What the fast path reads, if it accepts the value as a stream like the given one."""
    sizes = stream.state.ints.size, stream.state.floats.size
    (read,) = read_streams([value], stream.fingerprint, *sizes)
    if read is None:
        raise CodecError("not by the fast path")
    return read


@given(STATES, REPLIES)
def test_states_and_replies_round_trip_bit_for_bit(stream: StreamState, reply: StoredReply) -> None:
    value = encode_state(stream)
    assert same_stream(decode_state(value), stream)
    header = StateHeader.decode(value[:HEADER_BYTES])
    assert (header.head, header.last) == (stream.head, stream.last)
    size = len(encode_state(stream._replace(source=None)))
    assert (header.size_bytes, header.updated_ms) == (size, stream.updated_ms)
    assert not header.is_tombstone
    assert same_reply(decode_reply(encode_reply(reply)), reply)


@given(STATES)
def test_the_fast_path_reads_the_heads_of_exact_streams_with_a_last_chunk(
    stream: StreamState,
) -> None:
    floats, ints = stream.state
    whole, fingerprint = encode_state(stream), stream.fingerprint
    tombstone = encode_tombstone(Tombstone(StreamHead(b"epoch-89", bytes(16), 0)))
    values = [b"", whole, tombstone, whole[:-1]]
    is_fast = stream.last and stream.since is None and stream.source is None
    known = cached(stream) if is_fast else None
    assert read_streams(values, fingerprint, ints.size, floats.size) == [None, known, None, None]
    other = bytes(byte ^ 1 for byte in fingerprint)
    assert read_streams(values, other, ints.size, floats.size) == [None] * 4
    assert read_streams(values, fingerprint, ints.size, floats.size + 1) == [None] * 4


def test_the_fast_path_leaves_streams_that_are_not_finite_to_the_decoder() -> None:
    stream = Streams().first(floats=4, ints=1)
    value = encode_state(stream)
    infinite = resealed(value, len(value) - 4, 12, struct.pack("<f", math.inf))
    assert read_streams([value, infinite], stream.fingerprint, 1, 4) == [None, None]
    assert head_of(stream, value) == cached(stream)


@given(st.binary(min_size=8, max_size=8))
def test_a_tombstone_round_trips_and_its_header_has_no_head(epoch: bytes) -> None:
    tombstone = Tombstone(StreamHead(epoch, bytes(16), 0))
    value = encode_tombstone(tombstone)
    assert (len(value), value[:6], value[32:40]) == (HEADER_BYTES, TOMBSTONE_PREFIX, epoch)
    assert decode_state(value) == tombstone
    assert StateHeader.decode(value).is_tombstone
    assert unpack_head(read_packed_head(value)) == tombstone.head


@pytest.mark.parametrize(
    ("at", "patch"),
    [(5, b"\x05"), (5, b"\x06"), (6, b"\1"), (16, b"\1"), (40, b"\1"), (56, b"\1"), (88, b"\1")],
)
def test_a_tombstone_with_nonzero_fields_is_rejected(at: int, patch: bytes) -> None:
    value = encode_tombstone(Tombstone(StreamHead(b"epoch-89", bytes(16), 0)))
    with pytest.raises(CodecError):
        decode_state(resealed(value, at, 12, patch))
    with pytest.raises(CodecError):
        decode_state(value + b"\0")


def test_the_layout_of_a_state_matches_its_documentation() -> None:
    head = StreamHead(b"epoch-89", b"tag-0123456789ab", 0x0102030405060708)
    state = State(np.array([1.5, -2.0], np.float32), np.array([-3, 2**62, 7], np.int64))
    last = LastChunk(0x1112131415161718, b"digest-789abcdef")
    value = encode_state(StreamState(head, Feed.INPUTS, b"fingerprint-cdef", last, -5, state))
    assert value[0:4] == b"CRRY"
    assert value[4] == 1
    assert value[5] == 0b11
    assert value[6:8] == bytes([3, 0])
    assert value[8:12] == bytes([2, 0, 0, 0])
    assert value[12:16] == struct.pack("<I", zlib.crc32(value[:12] + value[16:]))
    assert value[16:32] == b"fingerprint-cdef"
    assert value[32:40] == b"epoch-89"
    assert value[40:56] == b"tag-0123456789ab"
    assert value[32:56] == pack_head(head)[COMPARED]
    assert value[56:64] == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    assert value[64:72] == bytes([0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11])
    assert value[72:88] == b"digest-789abcdef"
    assert value[88:96] == struct.pack("<q", -5)
    assert value[96:] == struct.pack("<3q2f", -3, 2**62, 7, 1.5, -2.0)
    existed = decode_state(value)._replace(last=last._replace(stream_existed=True))
    value = encode_state(existed)
    assert value[5] == 0b1011
    assert decode_state(value).last == existed.last
    inexact = encode_state(existed._replace(since=0x2122232425262728))
    assert inexact[5] == 0b11011
    assert inexact[16:] == value[16:] + bytes(range(0x28, 0x20, -1))
    assert inexact[12:16] == struct.pack("<I", zlib.crc32(inexact[:12] + inexact[16:]))
    mark = SourceMark("flüge:3", 0x3132333435363738, 5)
    marked = encode_state(existed._replace(source=mark))
    assert marked[5] == 0b101011
    assert marked[16:] == value[16:] + struct.pack("<QQH", mark.offset, 5, 8) + b"fl\xc3\xbcge:3"
    assert marked[12:16] == struct.pack("<I", zlib.crc32(marked[:12] + marked[16:]))
    both = encode_state(existed._replace(source=mark, since=7))
    assert both[5] == 0b111011
    assert both[16:] == marked[16:] + struct.pack("<Q", 7)
    assert [decode_state(each).source for each in (value, marked, both)] == [None, mark, mark]
    assert [decode_state(each).since for each in (value, marked, both)] == [None, None, 7]
    assert [has_source_mark(each) for each in (b"", value, inexact, marked, both)] == [
        *[False] * 3,
        *[True] * 2,
    ]


def test_states_of_exact_and_inexact_streams_are_decoded_together() -> None:
    streams = Streams()
    exact, other = streams.first(floats=5, ints=2), streams.first(floats=5, ints=2)
    marked = exact._replace(source=SourceMark("flights", 3))
    values = [encode_state(exact), encode_state(other._replace(since=3)), encode_state(marked)]
    floats, ints = decode_states(values, 2, 5)
    np.testing.assert_array_equal(
        floats, [exact.state.floats, other.state.floats, exact.state.floats]
    )
    np.testing.assert_array_equal(ints, [exact.state.ints, other.state.ints, exact.state.ints])


def test_a_stream_with_a_source_mark_is_not_read_on_the_fast_path() -> None:
    stream = Streams().first(floats=5, ints=2)
    marked = stream._replace(source=SourceMark("flights", 3))
    values = [encode_state(stream), encode_state(marked)]
    plain, read = read_streams(values, stream.fingerprint, 2, 5)
    assert plain is not None
    assert read is None


@pytest.mark.parametrize(
    ("mark", "event", "covered"),
    [
        (SourceMark("flights", 7, 2), SourceMark("flights", 7, 2), True),
        (SourceMark("flights", 7, 2), SourceMark("flights", 7, 1), True),
        (SourceMark("flights", 7, 2), SourceMark("flights", 6, 9), True),
        (SourceMark("flights", 7, 2), SourceMark("flights", 7, 3), False),
        (SourceMark("flights", 7, 2), SourceMark("flights", 8, 0), False),
        (SourceMark(source_name("flights", 1), 7), SourceMark(source_name("flights", 2), 3), False),
    ],
)
def test_a_source_mark_covers_events_up_to_its_offset(
    mark: SourceMark, event: SourceMark, covered: bool
) -> None:
    assert mark.covers(event) is covered


def test_offsets_are_numbers_of_kafka_or_ids_of_entries() -> None:
    assert format_offset(SourceMark(source_name("flights"), 1700000000000, 3)) == "1700000000000-3"
    assert format_offset(SourceMark(source_name("flights", 3), 42)) == "42"
    assert parse_offset("1700000000000-3") == (1700000000000, 3)
    assert parse_offset("42") == (42, 0)
    for text in ("", "-1", "1-", "x", "1-2-3", "1.5", "٣", str(2**64)):
        with pytest.raises(ValueError, match="expected an offset"):
            parse_offset(text)


@pytest.mark.parametrize("kind", ["state", "inexact", "marked", "head", "reply"])
def test_every_flipped_bit_and_every_other_length_is_rejected(kind: str) -> None:
    streams = Streams()
    stream = streams.first(floats=5, ints=2)
    if kind == "inexact":
        stream = stream._replace(since=1)
    if kind == "marked":
        stream = stream._replace(source=SourceMark("flights", 5))
    value = encode_reply(streams.reply(stream)) if kind == "reply" else encode_state(stream)
    decoders = {"head": partial(head_of, stream), "reply": decode_reply}
    decode = decoders.get(kind, decode_state)
    damaged = [value[:length] for length in range(len(value))]
    damaged += [value + more for more in (b"\0", b"\0" * 4, value)]
    for bit in range(8 * len(value)):
        flipped = bytearray(value)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for each in damaged:
        with pytest.raises(CodecError):
            decode(each)
    for header in (value[: HEADER_BYTES - 1], b"XXXX" + value[4:], value[:4] + b"\2" + value[5:]):
        with pytest.raises(CodecError):
            StateHeader.decode(header)


@pytest.mark.parametrize(
    ("kind", "at", "patch", "reason"),
    [
        ("state", 0, b"CRRX", "magic"),
        ("state", 4, b"\x02", "format"),
        ("state", 5, b"\x13", "bytes"),
        ("state", 5, b"\x23", "source mark"),
        ("state", 5, b"\x43", "flags"),
        ("state", 5, b"\x83", "flags"),
        ("state", 6, b"\x03", "bytes"),
        ("state", 5, b"\x00", "last chunk"),
        ("state", 5, b"\x09", "last chunk"),
        ("state", 96, struct.pack("<f", float("nan")), "finite"),
        ("state", 100, struct.pack("<f", float("-inf")), "finite"),
        ("reply", 0, b"CRRY", "magic"),
        ("reply", 4, b"\x02", "format"),
        ("reply", 5, b"\x01", "zero"),
        ("reply", 8, b"\x05", "bytes"),
        ("reply", 52, struct.pack("<f", float("inf")), "finite"),
    ],
)
def test_unknown_bytes_are_rejected_despite_a_valid_checksum(
    kind: str, at: int, patch: bytes, reason: str
) -> None:
    streams = Streams()
    stream = streams.first(floats=4, ints=0)
    value = encode_state(stream) if kind == "state" else encode_reply(streams.reply(stream))
    decode = decode_state if kind == "state" else decode_reply
    with pytest.raises(CodecError, match=reason):
        decode(resealed(value, at, 12 if kind == "state" else 16, patch))


def test_values_outside_the_layout_are_not_encoded() -> None:
    streams = Streams()
    good = streams.first(floats=3, ints=1)
    ints = good.state.ints
    for state in (
        State(good.state.floats.astype(np.float64), ints),
        State(good.state.floats.reshape(1, 3), ints),
        State(good.state.floats, ints.astype(np.int32)),
        State(good.state.floats, np.zeros(70_000, np.int64)),
    ):
        with pytest.raises(CodecError):
            encode_state(StreamState(good.head, good.feed, good.fingerprint, good.last, 0, state))
    for head in (
        StreamHead(b"short", good.head.tag, 1),
        StreamHead(good.head.epoch, good.head.tag, 2**64),
    ):
        with pytest.raises(CodecError):
            encode_state(StreamState(head, good.feed, good.fingerprint, good.last, 0, good.state))
    for mark in (
        SourceMark("flights", 2**64),
        SourceMark("flights", -1),
        SourceMark("x" * 2**16, 1),
    ):
        with pytest.raises(CodecError):
            encode_state(good._replace(source=mark))
    for outputs in (np.zeros((2, 2)), np.zeros(4, np.float32)):
        with pytest.raises(CodecError):
            encode_reply(StoredReply(good.head, outputs))
    for head in (
        (b"short", bytes(16), 0),
        (bytes(8), b"t" * 16, 0),
        (bytes(8), bytes(16), 1),
    ):
        with pytest.raises(CodecError):
            encode_tombstone(Tombstone(StreamHead(*head)))


def test_arrays_are_encoded_by_value_and_decoded_read_only() -> None:
    streams = Streams()
    good = streams.first(floats=8, ints=4)
    state = State(good.state.floats[::2], good.state.ints[::-1])
    found = decode_state(encode_state(good._replace(state=state))).state
    assert np.array_equal(found.floats, good.state.floats[::2])
    assert np.array_equal(found.ints, good.state.ints[::-1])
    reply = decode_reply(encode_reply(streams.reply(good)))
    for array in (found.floats, found.ints, reply.outputs):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
