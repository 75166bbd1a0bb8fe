"""HTTP/2 connections, by raw frames: flow control, limits, and the end of streams."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hpack import Encoder

from service.server import http2_protocol
from service.server.connections import Phase
from service.server.http2_headers import (
    CACHED_BLOCK_BYTES,
    CACHED_BLOCKS,
    MAX_HEADERS_BYTES,
    HeadDecoder,
)
from service.server.http2_protocol import (
    CONNECTION_WINDOW,
)
from service.server.http2_stream import (
    ACK,
    END_HEADERS,
    END_STREAM,
    MAX_FRAME_BYTES,
    PADDED,
    PRIORITY,
    STREAM_WINDOW,
    ErrorCode,
    FrameType,
    Http2Stream,
    encode_frame,
)
from service.server.settings import ConnectionSettings
from tests.support.http2 import (
    INITIAL_WINDOW,
    LARGE_WINDOWS,
    LONGEST,
    REQUEST,
    RESPONSE,
    TRAILERS,
    Client,
    Echo,
    connected,
)
from tests.support.servers import becomes


async def test_response_echoes_the_request_in_frames_that_the_client_allows() -> None:
    async with connected(LARGE_WINDOWS) as (client, _):
        client.send(FrameType.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**20))
        client.open(1)
        sent = random.Random(1).randbytes(3 * MAX_FRAME_BYTES)
        for at in range(0, len(sent), MAX_FRAME_BYTES):
            client.send(FrameType.DATA, 0, 1, sent[at : at + MAX_FRAME_BYTES])
        client.send(FrameType.DATA, END_STREAM, 1)
        is_last = lambda flags, *_: bool(flags & END_STREAM)  # noqa: E731
        frames = await client.receive_until(FrameType.HEADERS, is_found=is_last)
        assert b"".join(payload for kind, *_, payload in frames if kind == FrameType.DATA) == sent
        assert [payload for kind, *_, payload in frames if kind == FrameType.HEADERS] == [
            RESPONSE,
            TRAILERS,
        ]
        assert [each.releases for each in Echo.opened] == [1]


async def test_bytes_are_processed_however_they_are_cut() -> None:
    async with connected() as (client, _):
        client.open(1)
        client.send(FrameType.DATA, 0, 1, b"abc")
        frames = encode_frame(FrameType.HEADERS, END_HEADERS, 3, REQUEST)
        frames += encode_frame(FrameType.DATA, END_STREAM, 3, b"def")
        for byte in frames:
            client.writer.write(bytes((byte,)))
            await client.writer.drain()
            await asyncio.sleep(0)
        assert await client.receive_data(6) == b"abcdef"


@pytest.mark.parametrize("flags", [END_HEADERS, END_HEADERS | PADDED | PRIORITY])
async def test_header_block_may_be_continued_padded_and_have_a_priority(flags: int) -> None:
    async with connected() as (client, _):
        before, after = (b"\3" + bytes(5), bytes(3)) if flags & PADDED else (b"", b"")
        client.open(1, before + REQUEST + after, flags)
        client.open(3, before + REQUEST[:5] + after, flags & ~END_HEADERS)
        client.send(FrameType.CONTINUATION, 0, 3, REQUEST[5:9])
        client.send(FrameType.CONTINUATION, END_HEADERS, 3, REQUEST[9:])
        client.send(FrameType.DATA, PADDED, 3, b"\2abc\0\0")
        assert await client.receive_data(3) == b"abc"
        [first, second] = Echo.opened
        assert first.head == second.head == ((b":method", b"POST"), (b":path", b"/echo"))


async def test_cached_heads_are_those_that_the_table_gives() -> None:
    """A client repeats blocks, and changes its table between them."""
    encoder, source = Encoder(), random.Random(7)
    names = [(b"k%d" % at, b"%d" % (at % 3)) for at in range(90)]
    expected = []
    async with connected() as (client, _):
        for at in range(300):
            headers = [names[source.randrange(90 if at % 40 == 0 else 4)] for _ in range(3)]
            expected.append(tuple(headers))
            client.open(2 * at + 1, encoder.encode(headers), END_HEADERS | END_STREAM)
        await client.settle()
    assert [each.head for each in Echo.opened] == expected


async def test_cached_head_is_dropped_once_the_table_has_changed() -> None:
    """A block that refers to the newest entry means another one after each."""
    async with connected() as (client, _):
        for at in range(3):
            client.open(4 * at + 1, b"\x40\1k\1%d" % at)
            client.open(4 * at + 3, b"\xbe")
        await client.settle()
    assert [each.head for each in Echo.opened] == [((b"k", b"%d" % (at // 2)),) for at in range(6)]


async def test_no_more_is_sent_than_the_windows_allow() -> None:
    async with connected(struct.pack(">HI", INITIAL_WINDOW, 10)) as (client, _):
        client.open(1)
        client.send(FrameType.DATA, END_STREAM, 1, bytes(100))
        data = [each for each in await client.settle() if each[0] == FrameType.DATA]
        assert [len(each[3]) for each in data] == [10]
        client.send(FrameType.WINDOW_UPDATE, 0, 1, struct.pack(">I", 30))
        assert len(await client.receive_data(30)) == 30
        # 60 bytes are left, and the window is 10 + 30 - 40 = 0; now it shrinks to -10, then grows
        client.send(FrameType.SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW, 0))
        client.send(FrameType.WINDOW_UPDATE, 0, 1, struct.pack(">I", 15))
        assert len(await client.receive_data(5)) == 5
        assert not [each for each in await client.settle() if each[0] == FrameType.DATA]
        client.send(FrameType.SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW, 1000))
        assert len(await client.receive_data(55)) == 55
        assert (await client.receive())[3] == TRAILERS


@pytest.mark.parametrize(
    "frames",
    [
        encode_frame(FrameType.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)),
        encode_frame(FrameType.WINDOW_UPDATE, 0, 1, struct.pack(">I", 1)),
        encode_frame(FrameType.SETTINGS, 0, 0),
        encode_frame(FrameType.SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW, 0) * 20),
    ],
)
async def test_frames_that_widen_windows_do_not_each_try_to_send_all_streams(
    frames: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a thousand of each took the event loop for seconds."""
    sends = []
    monkeypatch.setattr(
        Echo, "send", lambda self: sends.append(Http2Stream.send(self)) or sends[-1]
    )
    async with connected(struct.pack(">HI", INITIAL_WINDOW, 0)) as (client, _):
        for stream in range(1, 201, 2):
            client.open(stream)
            client.send(FrameType.DATA, 0, stream, bytes(1000))
        await client.settle()
        sends.clear()
        client.writer.write(frames * 500)
        await client.settle()
    assert len(sends) <= 2000


async def test_time_of_unsent_responses_is_checked_by_one_timer() -> None:
    """However often a client lets them wait."""
    async with connected(struct.pack(">HI", INITIAL_WINDOW, 0)) as (client, connections):
        await client.settle()
        [connection] = connections._seen
        timers, loop = [], connection.loop
        connection.loop = SimpleNamespace(  # type: ignore[assignment]
            call_soon=loop.call_soon,
            time=loop.time,
            call_later=lambda *timer: timers.append(timer) or loop.call_later(*timer),
        )
        for stream in range(1, 21, 2):
            client.open(stream)
            client.send(FrameType.DATA, END_STREAM, stream, b"x")
            client.send(FrameType.WINDOW_UPDATE, 0, stream, struct.pack(">I", 1))
            await client.receive_until(
                FrameType.HEADERS, is_found=lambda flags, *_: flags & END_STREAM
            )
        assert len(timers) == 1


async def test_streams_share_the_window_of_the_connection() -> None:
    async with connected(LARGE_WINDOWS) as (client, _):
        total = 2**16 - 1
        for stream in (1, 3):
            client.open(stream)
            for _ in range(3):
                client.send(FrameType.DATA, 0, stream, bytes(MAX_FRAME_BYTES))
        frames = await client.settle()
        assert sum(len(each[3]) for each in frames if each[0] == FrameType.DATA) == total
        client.send(FrameType.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**20))
        await client.receive_data(6 * MAX_FRAME_BYTES - total)


async def test_window_of_a_stream_is_restored_only_while_it_reads() -> None:
    async with connected(LARGE_WINDOWS) as (client, _):
        client.send(FrameType.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30))
        client.open(1)
        await client.settle()
        [stream] = Echo.opened
        stream.reads = False
        for _ in range(STREAM_WINDOW // MAX_FRAME_BYTES):
            client.send(FrameType.DATA, 0, 1, bytes(MAX_FRAME_BYTES))
        updates = [each for each in await client.settle() if each[0] == FrameType.WINDOW_UPDATE]
        assert [each[2] for each in updates if each[2]] == []
        stream.reads = True
        stream.restore_window()
        updates = [each for each in await client.settle() if each[0] == FrameType.WINDOW_UPDATE]
        assert [each[1:] for each in updates] == [(0, 1, struct.pack(">I", STREAM_WINDOW))]


async def test_window_of_the_connection_is_restored_whatever_its_streams_do() -> None:
    async with connected(LARGE_WINDOWS) as (client, _):
        client.send(FrameType.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30))
        frames = []
        for stream in range(1, 31, 2):
            client.open(stream)
            frames += await client.settle()
            Echo.opened[-1].reads = False
            for _ in range(STREAM_WINDOW // MAX_FRAME_BYTES):
                client.send(FrameType.DATA, 0, stream, bytes(MAX_FRAME_BYTES))
        frames += await client.settle()
        restored = [each for each in frames if each[0] == FrameType.WINDOW_UPDATE and each[2] == 0]
        assert restored
        assert sum(len(each.received) for each in Echo.opened) > 3 * CONNECTION_WINDOW


async def test_streams_above_the_limit_are_refused() -> None:
    async with connected() as (client, _):
        for at in range(http2_protocol.MAX_STREAMS + 1):
            client.open(2 * at + 1)
        [*_, (_, _, stream, code)] = await client.receive_until(FrameType.RST_STREAM)
        assert (stream, code) == (2 * at + 1, struct.pack(">I", ErrorCode.REFUSED_STREAM))
        client.send(FrameType.DATA, 0, 1, b"x")
        assert await client.receive_data(1) == b"x"


async def test_reset_stream_is_cancelled_and_its_later_frames_are_ignored() -> None:
    async with connected() as (client, _):
        client.open(1)
        client.send(FrameType.RST_STREAM, 0, 1, struct.pack(">I", ErrorCode.CANCEL))
        client.send(FrameType.DATA, 0, 1, b"late")
        client.send(FrameType.WINDOW_UPDATE, 0, 1, struct.pack(">I", 1))
        client.open(1, REQUEST, END_HEADERS | END_STREAM)
        client.open(3)
        client.send(FrameType.DATA, 0, 3, b"next")
        assert await client.receive_data(4) == b"next"
        assert [(each.is_cancelled, each.releases) for each in Echo.opened] == [
            (True, 1),
            (False, 0),
        ]


async def test_response_that_ends_before_its_request_resets_the_rest_of_it() -> None:
    async with connected() as (client, _):
        client.open(1)
        await client.settle()
        Echo.opened[0].finish(TRAILERS)
        [*_, (_, _, stream, code)] = await client.receive_until(FrameType.RST_STREAM)
        assert (stream, code) == (1, struct.pack(">I", ErrorCode.NO_ERROR))


async def test_retired_connection_ends_after_its_last_stream() -> None:
    async with connected() as (client, connections):
        client.open(1)
        await client.settle()
        connections.retire()
        [*_, (_, _, _, goaway)] = await client.receive_until(FrameType.GOAWAY)
        assert goaway == struct.pack(">II", 1, ErrorCode.NO_ERROR)
        client.open(3)
        client.send(FrameType.DATA, END_STREAM, 3, b"not processed")
        client.send(FrameType.DATA, END_STREAM, 1, b"last")
        assert await client.receive_data(4) == b"last"
        assert (await client.receive())[3] == TRAILERS
        assert len(Echo.opened) == 1
        with pytest.raises(asyncio.IncompleteReadError):
            await client.receive()


async def test_connection_above_the_limit_is_told_to_go_away() -> None:
    async with connected(limits=ConnectionSettings(max_connections=1)) as (client, _):
        await client.settle()
        host, port = client.writer.get_extra_info("peername")
        other = Client(*await asyncio.open_connection(host, port))
        assert await other.expect_end() == ErrorCode.ENHANCE_YOUR_CALM
        other.writer.close()


async def test_idle_client_is_pinged_and_disconnected_without_an_answer() -> None:
    async with connected() as (client, connections):
        await client.settle()
        [connection] = connections._seen
        assert connection.phase is Phase.LIVE
        for _ in range(2):
            connection.expire(Phase.LIVE)
            frame = (await client.receive_until(FrameType.PING))[-1]
            client.send(FrameType.PING, ACK, 0, frame[3])
            await client.settle()
        connection.expire(Phase.LIVE)
        connection.expire(Phase.LIVE)
        await becomes(lambda: len(connections) == 0, "the end of the connection")


async def test_stream_whose_response_is_not_received_is_reset() -> None:
    """While other streams of its connection are served."""
    limits = ConnectionSettings(send_timeout_s=0.05)
    async with connected(struct.pack(">HI", INITIAL_WINDOW, 0), limits=limits) as (client, _):
        for identity in (1, 3):
            client.open(identity)
            client.send(FrameType.DATA, END_STREAM, identity, b"x")
            [*_, (_, _, stream, code)] = await client.receive_until(FrameType.RST_STREAM)
            assert (stream, code) == (identity, struct.pack(">I", ErrorCode.CANCEL))
        assert [(each.is_cancelled, each.releases) for each in Echo.opened] == 2 * [(True, 1)]
        await client.settle()


async def test_client_that_does_not_read_is_not_read() -> None:
    async with connected(LARGE_WINDOWS) as (client, connections):
        client.send(FrameType.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30))
        await client.settle()
        [connection] = connections._seen
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.open(1)
        while not connection.is_write_paused:  # type: ignore[attr-defined]
            client.send(FrameType.DATA, 0, 1, bytes(MAX_FRAME_BYTES))
            await asyncio.sleep(0)
        assert connection.phase is Phase.SEND
        received = len(Echo.opened[0].received)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        await client.settle()
        assert len(Echo.opened[0].received) >= received
        assert not connection.is_write_paused  # type: ignore[attr-defined]


class Turns:
    """Records the connections that wait for their turn.

    Attributes:
        on_turn: what each of them does then.
    """

    def __init__(self) -> None:
        self.on_turn: list[Callable[[], None] | None] = []

    def wait(self, flow: object, on_turn: Callable[[], None] | None = None) -> None:
        self.on_turn.append(on_turn)

    def forget(self, flow: object) -> None:
        pass


async def test_connection_waits_for_its_turn_after_many_bytes() -> None:
    async with connected(LARGE_WINDOWS) as (client, connections):
        turns: Any = Turns()
        connections.turns = turns
        client.open(1)
        client.send(FrameType.DATA, 0, 1, bytes(100))
        await client.settle()
        assert turns.on_turn == []
        client.writer.writelines([encode_frame(FrameType.DATA, 0, 1, LONGEST) for _ in range(12)])
        await client.settle()
        assert turns.on_turn


@pytest.mark.parametrize(
    ("frame", "count"),
    [
        (encode_frame(FrameType.HEADERS, END_HEADERS, 0, REQUEST), 65),
        (encode_frame(FrameType.HEADERS, END_HEADERS, 0, b" " * MAX_HEADERS_BYTES), 2),
        (encode_frame(FrameType.DATA, 0, 0, b"x"), http2_protocol.WORK_AT_ONCE + 1),
    ],
    ids=["streams", "bytes of headers", "frames"],
)
async def test_connection_waits_for_its_turn_after_much_work(frame: bytes, count: int) -> None:
    async with connected(LARGE_WINDOWS) as (client, connections):
        client.open(1)
        await client.settle()
        turns: Any = Turns()
        connections.turns = turns
        is_data = frame[3] == FrameType.DATA
        streams = [1 if is_data else 2 * at + 3 for at in range(count)]
        client.writer.writelines(
            [frame[:5] + struct.pack(">I", stream) + frame[9:] for stream in streams]
        )
        await becomes(lambda: turns.on_turn, "the end of the turn")

        def processed() -> int:
            return len(Echo.opened[0].received) if is_data else len(Echo.opened) - 1

        assert count - 5 <= processed() < count
        while turns.on_turn:
            if (on_turn := turns.on_turn.pop()) is not None:
                on_turn()
        await becomes(lambda: processed() == count, "the rest")


def test_no_more_heads_are_cached_than_need_little_memory() -> None:
    """Each byte of a block may be a header."""
    read: list[int] = []
    decoder = HeadDecoder(lambda headers: read.append(len(headers)) or tuple(headers))
    for _ in range(3):
        decoder.decode(b"\x82" * CACHED_BLOCK_BYTES)
        decoder.decode(b"\x82" * (CACHED_BLOCK_BYTES + 1))
    assert read == [CACHED_BLOCK_BYTES, *[CACHED_BLOCK_BYTES + 1] * 3]
    for count in range(1, 10 * CACHED_BLOCKS):
        decoder.decode(b"\x83" * (count % CACHED_BLOCK_BYTES))
        assert len(decoder._heads) <= CACHED_BLOCKS
